// Tensor core instructions on 16-bit fragments (PTX ISA, mma.m16n8k16 and movmatrix).
//
// Lane 4g + c holds: A (16 × 16) a0 (row g, columns 2c, 2c + 1), a1 (row g + 8), a2 (row g, columns + 8), a3 (row g + 8,
// columns + 8); B (16 × 8) b0 (rows 2c, 2c + 1, column g), b1 (rows + 8); C (16 × 8) c0, c1 (row g, columns 2c, 2c + 1), c2, c3
// (row g + 8). Half subnormals are exact and as fast as other values.
#pragma once
#include <stdint.h>

namespace kvarn {

// c += A B, halves in, float32 sums.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 × 8 matrix of halves: lane 4g + c holds row g, columns 2c and 2c + 1.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace kvarn
