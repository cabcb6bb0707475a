// Append kernels of head dim 96. One kernel serves every pair of code widths.
#include "append.cuh"

KVARN_APPEND(96, 128)
KVARN_APPEND(96, 64)
