// Expand kernels of head dim 96. One kernel serves every pair of code widths.
#include "expand.cuh"

KVARN_EXPAND(96, 128)
KVARN_EXPAND(96, 64)
