// Append kernels of head dim 128. One kernel serves every pair of code widths.
#include "append.cuh"

KVARN_APPEND(128, 128)
KVARN_APPEND(128, 64)
