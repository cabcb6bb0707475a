// The PTX instructions of the attention kernels, one thin wrapper each.
//
// Fragments of mma.m16n8k16, lane l = 4 g + c: A holds a[0] (row g, k 2c..2c+1), a[1] (row g + 8), a[2] (row g, k + 8),
// a[3] (row g + 8, k + 8); B holds b0 (k 2c..2c+1, column g), b1 (k + 8); C holds (row g, columns 2c, 2c+1) and the same
// of row g + 8.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

namespace kvarn {

constexpr uint32_t kFullWarp = 0xffffffffu;

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Transposes an 8 x 8 matrix of halves that is spread over the warp.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t a) {
  uint32_t r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(a));
  return r;
}

// 2^x, relative error 2^-22; denormal results are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}

__device__ __forceinline__ uint32_t half2_mul(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

__device__ __forceinline__ float2 unpack_half2(uint32_t a) {
  __half2 h;
  memcpy(&h, &a, 4);
  return __half22float2(h);
}

// Two halves that hold 2^exponent.
__host__ __device__ constexpr uint32_t half2_power(int exponent) {
  return uint32_t(15 + exponent) << 10 | uint32_t(15 + exponent) << 26;
}

// 2^exponent by its bits: a loop would stay a loop in the compiled kernel.
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float(uint32_t(127 + exponent) << 23); }

__device__ __forceinline__ void load128(uint32_t* r, const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}

}  // namespace kvarn
