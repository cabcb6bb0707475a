// Head vectors of queries and outputs: eight neighbouring channels a lane, as rotate.cuh lays them out, and the queries of
// a block laid out as B fragments in shared memory.
//
// A query column is one query head of one query token: column = token * group + head within the group. Columns beyond the
// last are zeros. Queries carry softmax scale * log2(e), so logits come out in base 2, and a power of two, common to the
// block, that brings the largest element to [2^10, 2^11): small queries stay clear of the subnormals, products of two
// halves of the range.
#pragma once
#include <cuda_bf16.h>

#include "codes.cuh"
#include "params.cuh"
#include "rotate.cuh"

namespace kvarn {

constexpr float kLog2E = 1.4426950408889634f;

// How head vectors of D channels lie in a warp.
template <int D>
struct Vectors {
  static constexpr int lanes = vector_lanes<D>, per_warp = 32 / lanes;
  int vector, channel;  // this lane's vector of those in the warp, and its first channel; D or more: it holds none
  __device__ __forceinline__ Vectors() : vector(threadIdx.x % 32 / lanes), channel(8 * (threadIdx.x % lanes)) {}
  __device__ __forceinline__ bool holds() const { return channel < D; }
};

// Where row `row` of head `head` of a tensor has its channel `channel`.
__device__ __forceinline__ uint16_t* element(const Tensor& t, int row, int head, int channel) {
  return static_cast<uint16_t*>(t.data) + row * t.row_stride + head * t.head_stride + channel;
}

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Eight neighbouring elements; one load where they are aligned.
__device__ __forceinline__ void load_elements(const uint16_t* at, int dtype, float (&x)[8]) {
  uint16_t bits[8];
  if (aligned16(at)) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(at));
    memcpy(bits, &raw, 16);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = __ldg(at + i);
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    x[i] = dtype == kFloat16 ? __half2float(__ushort_as_half(bits[i])) : __uint_as_float(uint32_t(bits[i]) << 16);
}

__device__ __forceinline__ void store_elements(uint16_t* at, int dtype, const float (&x)[8]) {
  uint16_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // min and max drop a NaN: keep it.
    const float limited = x[i] != x[i] ? x[i] : fminf(fmaxf(x[i], -65504.0f), 65504.0f);
    bits[i] = dtype == kFloat16 ? __half_as_ushort(__float2half_rn(limited)) : __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
  }
  if (aligned16(at)) {
    uint4 raw;
    memcpy(&raw, bits, 16);
    *reinterpret_cast<uint4*>(at) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) at[i] = bits[i];
  }
}

// Lays a query block out as B fragments, [NT][D / 16][32 lanes] of 16 bytes: for each k step its two k halves, times 2^-place
// of their codes, rounded to half, and behind them what the rounding left, in half. Behind the 8 NT floats of `largest` comes
// what undoes the common power of two. All threads call. A barrier comes last within.
template <class L, int NT, int Warps>
__device__ __forceinline__ void make_fragments(const AttendParams& p, const Item& item, int head, float* largest, uint32_t* fragments) {
  constexpr int D = L::D;
  const Vectors<D> at;
  constexpr int each = (8 * NT + Warps * at.per_warp - 1) / (Warps * at.per_warp);
  const int first = threadIdx.x / 32 * at.per_warp + at.vector, columns = item.query_tokens * p.group;
  float x[each][8];
#pragma unroll
  for (int n = 0; n < each; n++) {
    const int column = first + n * Warps * at.per_warp;
#pragma unroll
    for (int i = 0; i < 8; i++) x[n][i] = 0;
    if (column < columns && at.holds())
      load_elements(element(p.q, item.query_row + column / p.group, head * p.group + column % p.group, at.channel), p.dtype,
                    x[n]);
  }
#pragma unroll
  for (int n = 0; n < each; n++) {
    float m = 0;
    if (!p.rotated) rotate<D>(x[n]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x[n][i] *= p.scale * kLog2E;
      m = fmaxf(m, fabsf(x[n][i]));  // drops NaN
    }
#pragma unroll
    for (int o = 1; o < at.lanes; o *= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, o));
    const int column = first + n * Warps * at.per_warp;
    if (at.channel == 0 && column < 8 * NT) largest[column] = m;
  }
  __syncthreads();
  float m = 0;
#pragma unroll
  for (int column = 0; column < 8 * NT; column++) m = fmaxf(m, largest[column]);
  // Zeros, infinities and what would leave float32 behind: any shift will do.
  const int shift = min(max(10 - (int(__float_as_uint(m) >> 23) - 127), -100), 100);
  const float factor = power_of_two(shift);
  if (threadIdx.x == 0) largest[8 * NT] = power_of_two(-shift);
  const int step = at.channel / 16, half = at.channel / 8 % 2;
#pragma unroll
  for (int n = 0; n < each; n++) {
    const int column = first + n * Warps * at.per_warp;
    if (column >= 8 * NT || !at.holds()) continue;
    const float weight = factor * power_of_two(-place(D, L::key_bits, step, half));
    uint32_t* at_lane = fragments + ((column / 8 * (D / 16) + step) * 32 + column % 8 * 4) * 4 + half;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = x[n][2 * i] * weight, high = x[n][2 * i + 1] * weight;
      at_lane[4 * i] = pack_half2(low, high);
      const float2 rounded = unpack_half2(at_lane[4 * i]);
      at_lane[4 * i + 2] = pack_half2(low - rounded.x, high - rounded.y);
    }
  }
  __syncthreads();
}

}  // namespace kvarn
