// Append kernels of head dim 64. One kernel serves every pair of code widths.
#include "append.cuh"

KVARN_APPEND(64, 128)
KVARN_APPEND(64, 64)
