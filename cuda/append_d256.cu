// Append kernels of head dim 256. One kernel serves every pair of code widths.
#include "append.cuh"

KVARN_APPEND(256, 128)
KVARN_APPEND(256, 64)
