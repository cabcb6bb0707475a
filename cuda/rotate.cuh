// The rotation of head vectors: block-diagonal Sylvester Hadamard, natural order, scaled by 1/sqrt(block).
//
// Layout: one vector per `vector_lanes` neighbouring lanes, 8 consecutive channels per lane (lanes beyond D / 8 hold zeros).
// Numerics: butterflies of strides 1, 2, 4 … in float32, then one multiplication: the bits of every other float32
// implementation that keeps this order. Additions only, so nothing can be contracted to a fused operation.
// Cost: log2 D additions per channel, log2(D / 8) shuffles per channel.
#pragma once

namespace kvarn {

// Lanes per vector: the power of two that holds D / 8.
template <int D>
constexpr int vector_lanes = D <= 16 ? 2 : D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;

// Size of the diagonal block that holds a channel: D cut greedily into descending powers of two.
template <int D>
__device__ __forceinline__ int rotation_block(int channel) {
  int first = 0, size = 16;
#pragma unroll
  for (int block = 256; block >= 16; block /= 2) {
    if (D & block) {
      if (channel >= first) size = block;
      first += block;
    }
  }
  return size;
}

__device__ __forceinline__ float rotation_scale(int block) {
  // float32 of 1/sqrt(block), correctly rounded.
  switch (block) {
    case 256: return 0.0625f;
    case 128: return 0.088388347648318440550f;
    case 64: return 0.125f;
    case 32: return 0.176776695296636881100f;
    default: return 0.25f;
  }
}

// Rotates in place; every lane of the warp takes part.
template <int D>
__device__ __forceinline__ void rotate(float (&x)[8]) {
  static_assert(D % 16 == 0 && D <= 256, "head dims with a rotation");
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & stride) continue;
      const float low = x[i], high = x[i + stride];
      x[i] = low + high;
      x[i + stride] = low - high;
    }
  }
  const int lane = threadIdx.x % vector_lanes<D>;
  const int block = rotation_block<D>(8 * lane);
#pragma unroll
  for (int mask = 1; mask < vector_lanes<D>; mask *= 2) {
    // Blocks begin at multiples of their size, so that partners lie in the same block.
    const bool inside = 8 * mask < block, high = lane & mask;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], mask);
      const float result = other + (high ? -x[i] : x[i]);
      x[i] = inside ? result : x[i];
    }
  }
  const float scale = rotation_scale(block);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], scale);
}

}  // namespace kvarn
