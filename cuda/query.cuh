// Queries of one item: loaded, rotated, scaled, rounded to half, and laid out as B fragments in shared memory.
//
// A query column is one query head of one query token: column = token * group + head within the group. Columns beyond the
// last are zeros. Queries carry softmax scale * log2(e), so logits come out in base 2, and a power of two, common to the
// item, that brings the largest element to [2^10, 2^11): small queries stay clear of the subnormals, products of two
// halves of the range.
#pragma once
#include <cuda_bf16.h>

#include "codes.cuh"
#include "params.cuh"

namespace kvarn {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float load_element(const Tensor& t, int64_t at, int dtype) {
  const uint16_t bits = static_cast<const uint16_t*>(t.data)[at];
  return dtype == kFloat16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t(bits) << 16);
}

__device__ __forceinline__ void store_element(const Tensor& t, int64_t at, int dtype, float value) {
  uint16_t bits;
  if (dtype == kFloat16) {
    // min and max drop a NaN: keep it.
    const float limited = fminf(fmaxf(value, -65504.0f), 65504.0f);
    bits = __half_as_ushort(__float2half_rn(value != value ? value : limited));
  } else {
    bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static_cast<uint16_t*>(t.data)[at] = bits;
}

// Largest power of two up to n.
__host__ __device__ constexpr int power_below(int n) { return n < 2 ? n : 2 * power_below(n / 2); }

// The register part of a rotation: one block of `Block` registers from `First` on, then the blocks behind it.
template <int Count, int First = 0>
__device__ __forceinline__ void rotate_registers(float (&v)[Count]) {
  constexpr int Block = power_below(Count - First);
#pragma unroll
  for (int stride = 1; stride < Block; stride *= 2)
#pragma unroll
    for (int i = 0; i < Block; i++)
      if ((i & stride) == 0) {
        const float a = v[First + i], b = v[First + i + stride];
        v[First + i] = a + b, v[First + i + stride] = a - b;
      }
  constexpr float scale = Block == 1   ? 0.17677669529663687f  // 1 / sqrt(32 Block)
                          : Block == 2 ? 0.125f
                          : Block == 4 ? 0.08838834764831845f
                                       : 0.0625f;
#pragma unroll
  for (int i = 0; i < Block; i++) v[First + i] = __fmul_rn(v[First + i], scale);
  if constexpr (First + Block < Count) rotate_registers<Count, First + Block>(v);
}

// Rotates a head vector spread over a warp, v[i] of lane l = channel 32 i + l. Same operations in the same order as the
// CPU: butterflies with strides 1, 2, 4 …, then one product. Blocks of D = 96 are 64 and 32.
template <int D>
__device__ __forceinline__ void rotate_warp(float (&v)[D / 32], int lane) {
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2)
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const float other = __shfl_xor_sync(kFullWarp, v[i], stride);
      v[i] = lane & stride ? other - v[i] : v[i] + other;
    }
  rotate_registers<D / 32>(v);
}

// Queries in shared memory before they are rounded: [8 NT][stride], and the largest magnitude of each column.
template <int D, int NT>
struct QueryRows {
  static constexpr int stride = D + 8;  // keeps the columns of a fragment apart in the banks
  static constexpr int bytes = 8 * NT * (stride + 1) * 4;
  float* values;
  float* largest;

  __device__ __forceinline__ explicit QueryRows(unsigned char* memory)
      : values(reinterpret_cast<float*>(memory)), largest(values + 8 * NT * stride) {}

  // Loads, rotates and scales. All warps take part.
  template <int Warps>
  __device__ __forceinline__ void load(const AttendParams& p, const Item& item, int head) const {
    const int lane = threadIdx.x % 32, columns = item.query_tokens * p.group;
    for (int column = threadIdx.x / 32; column < 8 * NT; column += Warps) {
      float v[D / 32], m = 0;
      if (column < columns) {
        const int64_t at = (item.query_row + column / p.group) * p.q.row_stride +
                           int64_t(head * p.group + column % p.group) * p.q.head_stride;
#pragma unroll
        for (int i = 0; i < D / 32; i++) v[i] = load_element(p.q, at + 32 * i + lane, p.dtype);
        if (!p.rotated) rotate_warp<D>(v, lane);
      } else {
#pragma unroll
        for (int i = 0; i < D / 32; i++) v[i] = 0;
      }
#pragma unroll
      for (int i = 0; i < D / 32; i++) {
        v[i] *= p.scale * kLog2E;
        m = fmaxf(m, fabsf(v[i]));  // drops NaN
        values[column * stride + 32 * i + lane] = v[i];
      }
#pragma unroll
      for (int o = 1; o < 32; o *= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, o));
      if (lane == 0) largest[column] = m;
    }
  }

  // The common power of two, after a barrier.
  __device__ __forceinline__ int shift() const {
    float m = 0;
#pragma unroll
    for (int column = 0; column < 8 * NT; column++) m = fmaxf(m, largest[column]);
    // Zeros, infinities and what would leave float32 behind: any shift will do.
    const int exponent = int(__float_as_uint(m) >> 23) - 127;
    return min(max(10 - exponent, -100), 100);
  }

  // B fragments as [NT][D / 32][32 lanes] of 16 bytes: k steps 2 j and 2 j + 1.
  //
  // For records: times 2^-place. For slots: the channels of two k steps are dealt out so that a lane's eight are
  // neighbours (see slot_tile.cuh): those of lane (g, c) are channels 32 j + 8 c … + 7 of column g.
  template <int KeyBits, bool Slots>
  __device__ __forceinline__ void fragments(int shift, uint4* out) const {
    const float factor = __uint_as_float(uint32_t(127 + shift) << 23);
    for (int at = threadIdx.x; at < NT * (D / 32) * 32; at += blockDim.x) {
      const int lane = at % 32, j = at / 32 % (D / 32), block = at / 32 / (D / 32);
      const float* row = values + (block * 8 + lane / 4) * stride + 32 * j;
      uint32_t f[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = Slots ? 8 * (lane % 4) + 2 * i : 16 * (i / 2) + 8 * (i % 2) + 2 * (lane % 4);
        const float unit = Slots ? factor : factor * power_of_two(-place(D, KeyBits, 2 * j + i / 2, i % 2));
        f[i] = pack_half2(row[channel] * unit, row[channel + 1] * unit);
      }
      out[at] = make_uint4(f[0], f[1], f[2], f[3]);
    }
  }
};

}  // namespace kvarn
