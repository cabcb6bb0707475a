#include "attend.cuh"
KVARN_ATTEND(128, 128, 4, 2, 1)
KVARN_ATTEND(128, 128, 4, 2, 2)
