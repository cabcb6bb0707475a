// Expand kernels of head dim 64. One kernel serves every pair of code widths.
#include "expand.cuh"

KVARN_EXPAND(64, 128)
KVARN_EXPAND(64, 64)
