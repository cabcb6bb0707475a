// Attention kernels of head dim 64, tiles of 128 tokens: one per pair of code widths and number of query column blocks.
#include "attend.cuh"

KVARN_ATTEND(64, 128, 4, 4, 1)
KVARN_ATTEND(64, 128, 4, 4, 2)

KVARN_ATTEND(64, 128, 4, 2, 1)
KVARN_ATTEND(64, 128, 4, 2, 2)

KVARN_ATTEND(64, 128, 3, 3, 1)
KVARN_ATTEND(64, 128, 3, 3, 2)

KVARN_ATTEND(64, 128, 2, 2, 1)
KVARN_ATTEND(64, 128, 2, 2, 2)

KVARN_ATTEND(64, 128, 8, 4, 1)
KVARN_ATTEND(64, 128, 8, 4, 2)

KVARN_ATTEND(64, 128, 8, 8, 1)
KVARN_ATTEND(64, 128, 8, 8, 2)
