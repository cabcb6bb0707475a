// Expand kernels of head dim 128. One kernel serves every pair of code widths.
#include "expand.cuh"

KVARN_EXPAND(128, 128)
KVARN_EXPAND(128, 64)
