// Expand kernels of head dim 256. One kernel serves every pair of code widths.
#include "expand.cuh"

KVARN_EXPAND(256, 128)
KVARN_EXPAND(256, 64)
