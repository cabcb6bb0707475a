// Reading rows of fp16 or bf16 tensors, 8 channels = 16 bytes per lane; rows start at multiples of 16 bytes.
//
// Numerics: NaN and infinities become 0 and are counted, before a rotation would spread them over the head. Elements beyond
// ±2^48 (bf16 only) are cut to it and counted as saturated: no sum of a rotation then leaves float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.cuh"

namespace kvarn {

// What storing met, of one thread.
struct Counts {
  unsigned non_finite = 0, saturated = 0;
};

constexpr float kInputMax = 281474976710656.0f;

__device__ __forceinline__ uint4 load_raw(const Tensor& tensor, int64_t row, int head, int channel) {
  const uint16_t* at = static_cast<const uint16_t*>(tensor.data) + row * tensor.row_stride + head * tensor.head_stride;
  return __ldg(reinterpret_cast<const uint4*>(at + channel));
}

// Two halves of one word to float32.
__device__ __forceinline__ float2 halves_to_floats(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

__device__ __forceinline__ void to_floats(uint4 raw, int dtype, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = dtype == kFloat16 ? halves_to_floats(words[i])
                                          : float2{__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void make_finite(float (&x)[8], Counts& counts) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if ((__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u) {
      x[i] = 0.0f;
      ++counts.non_finite;
    }
    if (fabsf(x[i]) > kInputMax) {
      x[i] = copysignf(kInputMax, x[i]);
      ++counts.saturated;
    }
  }
}

// Halves of a slot: finite where kvarn wrote them, but a borrowed slot may hold anything.
__device__ __forceinline__ uint32_t finite_halves(uint32_t word, Counts& counts) {
  if ((word & 0x7c00u) == 0x7c00u) {
    word &= 0xffff0000u;
    ++counts.non_finite;
  }
  if ((word & 0x7c000000u) == 0x7c000000u) {
    word &= 0x0000ffffu;
    ++counts.non_finite;
  }
  return word;
}

__device__ __forceinline__ uint4 finite_halves(uint4 raw, Counts& counts) {
  return {finite_halves(raw.x, counts), finite_halves(raw.y, counts), finite_halves(raw.z, counts),
          finite_halves(raw.w, counts)};
}

}  // namespace kvarn
