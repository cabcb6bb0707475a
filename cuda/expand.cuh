// Expands a range of one sequence's tokens, from records and slots, to dense K and V [tokens, kv_heads, D] in fp16 or bf16,
// rotated back or not.
//
// Method: the rotation H = H(D / 16 blocks) ⊗ H(16). H(16) runs on the tensor cores together with the decoding: A = the codes
// themselves (as subnormals), B = ± the channel parameters, so that no code is ever converted or scaled alone; the strides
// from 16 on are additions of accumulators in the same lane.
//   K: y = s_tok · (Σ q (s_chan H) + Σ 1 (z_chan H))        V: y = s_tok · Σ q (s_chan H) + z_tok · Σ 1 (s_chan H)
// Threads: a warp expands 16 tokens of one head's K or V, from a position that is a multiple of 16; a block's four warps lie in
// one tile. grid: (blocks of 64 positions that the range touches, 2 heads).
// The columns of B are permuted so that a lane ends up with 4 neighbouring channels: full 32-byte sectors are written.
// Numerics: products of codes and half parameters are exact, sums float32, one rounding to the caller's type (half saturates).
// Cost: about 8 operations per element; bound by writing 2 bytes per element.
#pragma once
#include "mma.cuh"
#include "params.cuh"
#include "rotate.cuh"
#include "shape.cuh"
#include "store.cuh"
#include "unpack.cuh"

namespace kvarn {

constexpr uint32_t kHalfOnes = 0x3c003c00u, kCodeOnes = 0x00010001u;  // 1.0; the code 1 as subnormal
constexpr float kCodeUnit = 16777216.0f;                              // codes enter as q · 2^-24

// H(16) or the identity as B operands: a pair of channel parameters p becomes (p ^ flip) & keep.
struct Basis {
  uint32_t flip[2][2], keep[2][2];  // [column block][k half]

  __device__ __forceinline__ Basis(int lane, bool identity) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int g = lane / 4, e = g / 2 * 4 + 2 * n + g % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        flip[n][half] = keep[n][half] = 0;
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int k = 2 * (lane % 4) + 8 * half + odd;
          flip[n][half] |= (!identity && __popc(k & e) % 2 ? 0x8000u : 0u) << (16 * odd);
          keep[n][half] |= (!identity || k == e ? 0xffffu : 0u) << (16 * odd);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t apply(uint32_t parameters, int n, int half) const {
    return (parameters ^ flip[n][half]) & keep[n][half];
  }
};

// One sum of 16 × 16: two column blocks.
struct Block {
  float c[2][4] = {};

  __device__ __forceinline__ void add(const uint32_t (&a)[4], const uint2& parameters, const Basis& basis) {
#pragma unroll
    for (int n = 0; n < 2; ++n) mma(c[n], a, basis.apply(parameters.x, n, 0), basis.apply(parameters.y, n, 1), c[n]);
  }
};

template <int value_>
struct Number {
  static constexpr int value = value_;
};

__device__ __forceinline__ float half_at(const uint8_t* at) { return __half2float(*reinterpret_cast<const __half*>(at)); }

// 16 tokens of K of a record: sums per block of 16 channels, and the factor of the lane's two tokens.
template <int D, int G, int bits, int first>
__device__ __forceinline__ void key_slice(const uint8_t* record, int slice, int lane, const Basis& basis, Block (&block)[D / 16],
                                          float (&factor)[2]) {
  constexpr int scale = D * G * bits / 8, zero = scale + 2 * D, token = zero + 2 * D;
  const SliceCodes<bits, D, G> codes(record, slice, lane);
  const int column = k_order(2 * (lane % 4), D);
  const uint32_t ones[4] = {kCodeOnes, kCodeOnes, kCodeOnes, kCodeOnes};
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    const uint32_t a[4] = {codes.pair(first + j, 0, 0), codes.pair(first + j, 0, 1), codes.pair(first + j, 1, 0),
                           codes.pair(first + j, 1, 1)};
    block[j].add(a, __ldg(reinterpret_cast<const uint2*>(record + scale + column) + j), basis);
    block[j].add(ones, __ldg(reinterpret_cast<const uint2*>(record + zero + column) + j), basis);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    factor[half] = kCodeUnit * half_at(record + token + row_order(16 * slice + lane / 4 + 8 * half, G));
  }
}

// 16 tokens of V of a record; `values` points to the record's V codes.
template <int D, int G, int bits, int first>
__device__ __forceinline__ void value_slice(const uint8_t* values, int slice, int lane, const Basis& basis,
                                            Block (&block)[D / 16]) {
  constexpr int channel = D * G * bits / 8, scale = channel + 2 * D, zero = scale + 2 * G;
  const SliceCodes<bits, D, G> codes(values, slice, lane);
  const uint32_t ones[4] = {kHalfOnes, kHalfOnes, kHalfOnes, kHalfOnes};
  float token_scale[2], token_zero[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = k_order(16 * slice + lane / 4 + 8 * half, G);
    token_scale[half] = kCodeUnit * half_at(values + scale + at);
    token_zero[half] = half_at(values + zero + at);
  }
  const auto* even = reinterpret_cast<const uint32_t*>(values + channel + row_order(2 * (lane % 4), D));
  const auto* odd = reinterpret_cast<const uint32_t*>(values + channel + row_order(2 * (lane % 4) + 1, D));
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    // The record has V's channels as rows of A; here they are summed over.
    const uint32_t a[4] = {transpose8x8(codes.pair(first + j, 0, 0)), transpose8x8(codes.pair(first + j, 0, 1)),
                           transpose8x8(codes.pair(first + j, 1, 0)), transpose8x8(codes.pair(first + j, 1, 1))};
    const uint32_t low = __ldg(even + j), high = __ldg(odd + j);
    const uint2 parameters{__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
    Block sum, offset;
    sum.add(a, parameters, basis);
    offset.add(ones, parameters, basis);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) block[j].c[n][i] = fmaf(sum.c[n][i], token_scale[i / 2], offset.c[n][i] * token_zero[i / 2]);
    }
  }
}

// 16 tokens of a slot [G][D].
template <int D>
__device__ __forceinline__ void slot_slice(const uint16_t* slot, int slice, int lane, const Basis& basis, Block (&block)[D / 16]) {
  const auto* at = reinterpret_cast<const uint32_t*>(slot + (16 * slice + lane / 4) * D) + lane % 4;
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    const uint32_t a[4] = {__ldg(at + 8 * j), __ldg(at + 4 * D + 8 * j), __ldg(at + 8 * j + 4), __ldg(at + 4 * D + 8 * j + 4)};
    block[j].add(a, {kHalfOnes, kHalfOnes}, basis);
  }
}

// Strides of 16 channels and more: whole blocks, in the same lane.
template <int D>
__device__ __forceinline__ void rotate_blocks(Block (&block)[D / 16]) {
#pragma unroll
  for (int stride = 1; stride < D / 16; stride *= 2) {
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      if (j & stride || 16 * stride >= rotation_block<D>(16 * j)) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float &low = block[j].c[i / 4][i % 4], &high = block[j + stride].c[i / 4][i % 4];
        const float sum = low + high, difference = low - high;
        low = sum;
        high = difference;
      }
    }
  }
}

template <int D, int G, Side side, int bits>
__device__ __forceinline__ void record_slice(const uint8_t* codes, int slice, int lane, const Basis& basis, Block (&block)[D / 16],
                                             float (&factor)[2]) {
  const auto run = [&](auto first) {
    if constexpr (side == Side::Key) {
      key_slice<D, G, bits, decltype(first)::value>(codes, slice, lane, basis, block, factor);
    } else {
      value_slice<D, G, bits, decltype(first)::value>(codes, slice, lane, basis, block);
    }
  };
  if (SliceCodes<bits, D, G>::split && slice % 2) {
    run(Number<D / 16 % 4>());
  } else {
    run(Number<0>());
  }
}

template <int D, int G, Side side>
__device__ __forceinline__ void expand_side(const ExpandParams& p, int head, int first_token) {
  const int lane = threadIdx.x % 32, tile = first_token / G, slice = first_token % G / 16;
  const int page = p.block_table[tile], slot = p.slot_table[tile];
  const Basis basis(lane, p.rotated);
  Block block[D / 16];
  float factor[2] = {1.0f, 1.0f};
  if (page < 0 || first_token < p.sink_tokens) {
    const uint16_t* at = p.cache.slots + ((int64_t(slot) * p.cache.kv_heads + head) * 2 + (side == Side::Value)) * (G * D);
    slot_slice<D>(at, slice, lane, basis, block);
  } else {
    const int bits = side == Side::Key ? p.key_bits : p.value_bits;
    const int key_end = D * G * p.key_bits / 8 + 4 * D + 2 * G;
    const int record_bytes = (key_end + D * G * p.value_bits / 8 + 2 * D + 4 * G + 127) / 128 * 128;
    const uint8_t* at = p.cache.pages + (int64_t(page) * p.cache.kv_heads + head) * record_bytes + (side == Side::Key ? 0 : key_end);
    switch (bits) {
      case 2: record_slice<D, G, side, 2>(at, slice, lane, basis, block, factor); break;
      case 3: record_slice<D, G, side, 3>(at, slice, lane, basis, block, factor); break;
      case 4: record_slice<D, G, side, 4>(at, slice, lane, basis, block, factor); break;
      default: record_slice<D, G, side, 8>(at, slice, lane, basis, block, factor);
    }
  }
  if (!p.rotated) rotate_blocks<D>(block);
  const Tensor& tensor = side == Side::Key ? p.k : p.v;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first_token - p.first + lane / 4 + 8 * half;
    if (token < 0 || token >= p.tokens) continue;
    uint16_t* row = static_cast<uint16_t*>(tensor.data) + token * tensor.row_stride + head * tensor.head_stride + 4 * (lane % 4);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      const float scale = factor[half] * (p.rotated ? 1.0f : rotation_scale(rotation_block<D>(16 * j)));
      const auto& c = block[j].c;
      *reinterpret_cast<uint2*>(row + 16 * j) = {round_pair(c[0][2 * half] * scale, c[0][2 * half + 1] * scale, p.dtype),
                                                 round_pair(c[1][2 * half] * scale, c[1][2 * half + 1] * scale, p.dtype)};
    }
  }
}

template <int D, int G>
__device__ __forceinline__ void expand(const ExpandParams& p) {
  const int first_token = p.first / 64 * 64 + (blockIdx.x * 4 + threadIdx.x / 32) * 16, head = blockIdx.y / 2;
  if (first_token + 16 <= p.first || first_token >= p.first + p.tokens) return;
  if (blockIdx.y % 2 == 0) {
    expand_side<D, G, Side::Key>(p, head, first_token);
  } else {
    expand_side<D, G, Side::Value>(p, head, first_token);
  }
}

}  // namespace kvarn

// A bound on blocks where the compiler would otherwise choose too few registers.
#define KVARN_EXPAND(D, G)                                                      \
  extern "C" __global__ void __launch_bounds__(128, (D) == 64 ? 4 : 1)          \
      kvarn_expand_d##D##_g##G(const __grid_constant__ kvarn::ExpandParams p) { \
    kvarn::expand<D, G>(p);                                                     \
  }
