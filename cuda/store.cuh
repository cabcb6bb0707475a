// Rounding to 16 bits and writing rows, 8 channels = 16 bytes per lane.
//
// Numerics: half to nearest even, saturating at ±65504, counted beyond it, as on the CPU. bf16 to nearest even; its range is
// float32's.
#pragma once
#include "load.cuh"

namespace kvarn {

constexpr float kHalfMax = 65504.0f;

__device__ __forceinline__ float saturate_half(float x) { return fminf(fmaxf(x, -kHalfMax), kHalfMax); }

// `x` as half.
__device__ __forceinline__ __half round_half(float x) { return __float2half_rn(saturate_half(x)); }

__device__ __forceinline__ __half round_half(float x, Counts& counts) {
  counts.saturated += fabsf(x) > kHalfMax;
  return round_half(x);
}

// What the half nearest to `x` holds.
__device__ __forceinline__ float through_half(float x) { return __half2float(round_half(x)); }

// Two halves in one word, `x` in the low bits.
__device__ __forceinline__ uint32_t round_halves(float x, float y) {
  uint32_t pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}

__device__ __forceinline__ uint4 round_halves(const float (&x)[8], Counts& counts) {
#pragma unroll
  for (int i = 0; i < 8; ++i) counts.saturated += fabsf(x[i]) > kHalfMax;
  return {round_halves(x[0], x[1]), round_halves(x[2], x[3]), round_halves(x[4], x[5]), round_halves(x[6], x[7])};
}

// Two values in the caller's type.
__device__ __forceinline__ uint32_t round_pair(float x, float y, int dtype) {
  if (dtype == kFloat16) return round_halves(x, y);
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Adds a warp's counts to the launch's.
__device__ __forceinline__ void add_counts(uint64_t* total, const Counts& counts) {
  const unsigned non_finite = __reduce_add_sync(0xffffffffu, counts.non_finite);
  const unsigned saturated = __reduce_add_sync(0xffffffffu, counts.saturated);
  if (threadIdx.x % 32 != 0) return;
  auto* at = reinterpret_cast<unsigned long long*>(total);
  if (non_finite) atomicAdd(at, static_cast<unsigned long long>(non_finite));
  if (saturated) atomicAdd(at + 1, static_cast<unsigned long long>(saturated));
}

}  // namespace kvarn
