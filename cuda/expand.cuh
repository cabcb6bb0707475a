// Expands a range of one sequence's tokens, from records and slots, to dense K and V [tokens, kv_heads, D] in fp16 or bf16,
// rotated back or not.
//
// Method: the rotation H = H(D / 16 blocks) ⊗ H(16). H(16) runs on the tensor cores together with the decoding: A = the codes
// themselves (as subnormals), B = ± the channel parameters, so that no code is ever converted or scaled alone; the strides
// from 16 on are additions of accumulators in the same lane.
//   K: y = s_tok · Σ q (s_chan H) + s_tok · Σ 1 (z_chan H)        V: y = s_tok · Σ q (s_chan H) + z_tok · Σ 1 (s_chan H)
// B and the constant of each channel, rotated already, are made once for all tokens of a tile that a warp expands.
// Threads: a warp expands 64 tokens of one head's K or V, 16 at a time with the next ones' codes under way, from a position
// that is a multiple of 64, so that they lie in one tile. Neighbouring warps take neighbouring heads: their rows are adjacent.
// The columns of B are permuted so that a lane ends up with 4 neighbouring channels, and with 8 after an exchange with its
// neighbour: 64 bytes of a row are written at once, since the load-store unit takes a cycle for each row of a store.
// Numerics: products of codes and half parameters are exact, sums float32, one rounding to the caller's type (half saturates).
// Cost: about 7 operations per element; bound by writing 2 bytes per element.
#pragma once
#include "mma.cuh"
#include "params.cuh"
#include "rotate.cuh"
#include "shape.cuh"
#include "store.cuh"
#include "unpack.cuh"

namespace kvarn {

constexpr uint32_t kHalfOnes = 0x3c003c00u;
constexpr float kCodeUnit = 16777216.0f;  // codes enter as q · 2^-24
constexpr int kWarpTokens = 64;

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

__device__ __forceinline__ float half_at(const uint8_t* at) { return __half2float(*reinterpret_cast<const __half*>(at)); }

// Where a record has what, for one side of it.
template <int D, int G, Side side, int bits>
struct Arrays {
  static constexpr bool key = side == Side::Key;
  static constexpr int channel_scale = D * G * bits / 8, channel_zero = channel_scale + 2 * D;  // V: no channel zero
  static constexpr int token_scale = key ? channel_zero + 2 * D : channel_zero, token_zero = token_scale + 2 * G;
};

// Channel parameters of a fragment as the k pairs of B.
template <Side side>
__device__ __forceinline__ uint2 channel_pairs(const uint8_t* parameters, int j, int lane, int D) {
  if (side == Side::Key) return __ldg(reinterpret_cast<const uint2*>(parameters + k_order(2 * (lane % 4), D)) + j);
  const uint32_t low = __ldg(reinterpret_cast<const uint32_t*>(parameters + row_order(2 * (lane % 4), D)) + j);
  const uint32_t high = __ldg(reinterpret_cast<const uint32_t*>(parameters + row_order(2 * (lane % 4) + 1, D)) + j);
  return {__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
}

// What all tokens of a tile share: B, and in shared memory what a token's constant is multiplied by, per channel.
template <int D, int G, Side side, int bits>
struct Channels {
  static constexpr bool held = D <= 128;  // B in registers; else made again for each slice, from the first-level cache
  using At = Arrays<D, G, side, bits>;
  uint32_t operand[held ? D / 16 : 1][2][2];
  const float4* constant;  // [fragment]: the lane's channels

  __device__ __forceinline__ Channels(const uint8_t* codes, int lane, const Basis& basis, bool rotated, float4* shared)
      : constant(shared + lane % 4) {
    const uint32_t ones[4] = {kHalfOnes, kHalfOnes, kHalfOnes, kHalfOnes};
    Block sum[D / 16];
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      if constexpr (held) {
        const uint2 scale = channel_pairs<side>(codes + At::channel_scale, j, lane, D);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          operand[j][n][0] = basis.apply(scale.x, n, 0);
          operand[j][n][1] = basis.apply(scale.y, n, 1);
        }
      }
      sum[j].add(ones, channel_pairs<side>(codes + (At::key ? At::channel_zero : At::channel_scale), j, lane, D), basis);
    }
    if (!rotated) rotate_blocks<D>(sum);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      const float scale = rotated ? 1.0f : rotation_scale(rotation_block<D>(16 * j));
      const auto& c = sum[j].c;
      if (lane < 4) shared[4 * j + lane] = {c[0][0] * scale, c[0][1] * scale, c[1][0] * scale, c[1][1] * scale};
    }
    __syncwarp();
  }

  __device__ __forceinline__ void multiply(Block& sum, const uint32_t (&a)[4], const uint8_t* codes, int j, int lane,
                                           const Basis& basis) const {
    if constexpr (held) {
#pragma unroll
      for (int n = 0; n < 2; ++n) mma(sum.c[n], a, operand[j][n][0], operand[j][n][1], sum.c[n]);
    } else {
      sum.add(a, channel_pairs<side>(codes + At::channel_scale, j, lane, D), basis);
    }
  }
};

// Codes of 16 tokens, and the factors of the lane's two.
template <int D, int G, Side side, int bits>
struct Slice {
  using At = Arrays<D, G, side, bits>;
  SliceCodes<bits, D, G> codes;
  float scale[2], constant[2];

  __device__ __forceinline__ Slice(const uint8_t* at, int slice, int lane) : codes(at, slice, lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = 16 * slice + lane / 4 + 8 * half;
      scale[half] = half_at(at + At::token_scale + (At::key ? row_order(token, G) : k_order(token, G)));
      constant[half] = At::key ? scale[half] : half_at(at + At::token_zero + k_order(token, G));
      scale[half] *= kCodeUnit;
    }
  }

  template <int first>
  __device__ __forceinline__ void multiply(Block (&block)[D / 16], const Channels<D, G, side, bits>& channels, const uint8_t* at,
                                           int lane, const Basis& basis) const {
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = codes.pair(first + j, i / 2, i % 2);
        // The record has V's channels as rows of A; here they are summed over.
        a[i] = At::key ? pair : transpose8x8(pair);
      }
      channels.multiply(block[j], a, at, j, lane, basis);
    }
  }
};

// Where a warp's tokens go.
template <int D>
struct Rows {
  uint16_t* data;  // the first token's row of the head, at the lane's channels of the first two fragments
  int64_t stride;
  int first_token, tokens, dtype;
  bool rotated;

  __device__ __forceinline__ Rows(const ExpandParams& p, const Tensor& tensor, int head, int lane)
      : data(static_cast<uint16_t*>(tensor.data) + head * tensor.head_stride + 16 * (lane % 2) + 8 * (lane % 4 / 2)),
        stride(tensor.row_stride), first_token(p.first), tokens(p.tokens), dtype(p.dtype), rotated(p.rotated) {}

  // Writes scale · block + constant · channels of 16 tokens; `channels(j)` gives the lane's 4 of fragment j.
  template <class Channels>
  __device__ __forceinline__ void write(Block (&block)[D / 16], const float (&scale)[2], const float (&constant)[2], int token,
                                        int lane, const Channels& channels) const {
    if (!rotated) rotate_blocks<D>(block);
    if (dtype == kFloat16) {
      write_as<kFloat16>(block, scale, constant, token, lane, channels);
    } else {
      write_as<kBFloat16>(block, scale, constant, token, lane, channels);
    }
  }

 private:
  // Four channels of the lane's row, in the caller's type.
  template <int type>
  static __device__ __forceinline__ uint2 four(const Block& block, int half, float scale, float constant, const float4& channel) {
    const auto& c = block.c;
    const int at = 2 * half;
    return {round_pair(fmaf(c[0][at], scale, constant * channel.x), fmaf(c[0][at + 1], scale, constant * channel.y), type),
            round_pair(fmaf(c[1][at], scale, constant * channel.z), fmaf(c[1][at + 1], scale, constant * channel.w), type)};
  }

  // Of two neighbouring fragments the even lanes take the first one, the odd lanes the second: 16 bytes a lane.
  template <int type, class Channels>
  __device__ __forceinline__ void write_as(const Block (&block)[D / 16], const float (&scale)[2], const float (&constant)[2],
                                           int token, int lane, const Channels& channels) const {
    const bool odd = lane % 2;
#pragma unroll
    for (int j = 0; j < D / 16; j += 2) {
      const float4 low = channels(j), high = channels(j + 1);
      const float low_unit = rotated ? 1.0f : rotation_scale(rotation_block<D>(16 * j));
      const float high_unit = rotated ? 1.0f : rotation_scale(rotation_block<D>(16 * j + 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 first = four<type>(block[j], half, scale[half] * low_unit, constant[half], low);
        const uint2 second = four<type>(block[j + 1], half, scale[half] * high_unit, constant[half], high);
        const uint2 kept = odd ? second : first, given = odd ? first : second;
        const uint2 got{__shfl_xor_sync(0xffffffffu, given.x, 1), __shfl_xor_sync(0xffffffffu, given.y, 1)};
        const uint4 eight = odd ? uint4{got.x, got.y, kept.x, kept.y} : uint4{kept.x, kept.y, got.x, got.y};
        const int row = token - first_token + lane / 4 + 8 * half;
        if (row >= 0 && row < tokens) *reinterpret_cast<uint4*>(data + row * stride + 16 * j) = eight;
      }
    }
  }
};

// Tokens `from` to `to` of a slot [G][D], 16 at a time; `tile` is the position of its first.
template <int D>
__device__ __forceinline__ void expand_slot(const uint16_t* slot, const Rows<D>& rows, int tile, int from, int to, int lane,
                                            const Basis& basis) {
  const float scale[2] = {1.0f, 1.0f}, constant[2] = {};
#pragma unroll 1
  for (int token = from; token < to; token += 16) {
    const auto* at = reinterpret_cast<const uint32_t*>(slot + (token - tile + lane / 4) * D) + lane % 4;
    Block block[D / 16];
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      const uint32_t a[4] = {__ldg(at + 8 * j), __ldg(at + 4 * D + 8 * j), __ldg(at + 8 * j + 4), __ldg(at + 4 * D + 8 * j + 4)};
      block[j].add(a, {kHalfOnes, kHalfOnes}, basis);
    }
    rows.write(block, scale, constant, token, lane, [](int) { return float4{}; });
  }
}

// Tokens `from` to `to` of a record, of which `codes` begins the side; `tile` is the position of its first.
template <int D, int G, Side side, int bits>
__device__ __forceinline__ void expand_record(const uint8_t* codes, const Rows<D>& rows, int tile, int from, int to, int lane,
                                              const Basis& basis, float4* shared) {
  Slice<D, G, side, bits> next(codes, (from - tile) / 16, lane);
  const Channels<D, G, side, bits> channels(codes, lane, basis, rows.rotated, shared);
#pragma unroll 1
  for (int token = from; token < to; token += 16) {
    const auto slice = next;
    if (token + 16 < to) next = Slice<D, G, side, bits>(codes, (token - tile) / 16 + 1, lane);
    Block block[D / 16];
    if (SliceCodes<bits, D, G>::split && (token - tile) / 16 % 2) {
      slice.template multiply<D / 16 % 4>(block, channels, codes, lane, basis);
    } else {
      slice.template multiply<0>(block, channels, codes, lane, basis);
    }
    rows.write(block, slice.scale, slice.constant, token, lane, [&](int j) { return channels.constant[4 * j]; });
  }
}

template <int D, int G, Side side>
__device__ __forceinline__ void expand_side(const ExpandParams& p, int head, int first_token, float4* shared) {
  const int lane = threadIdx.x % 32, tile = first_token / G * G;
  const int page = p.block_table[tile / G], slot = p.slot_table[tile / G];
  const Basis basis(lane, p.rotated);
  const Rows<D> rows(p, side == Side::Key ? p.k : p.v, head, lane);
  // Slices without a token of the range are left out.
  const int from = max(first_token, p.first / 16 * 16), to = min(first_token + kWarpTokens, p.first + p.tokens);
  const int record_from = page < 0 ? to : min(max(from, p.sink_tokens), to);
  if (from < record_from) {
    const uint16_t* at = p.cache.slots + ((int64_t(slot) * p.cache.kv_heads + head) * 2 + (side == Side::Value)) * (G * D);
    expand_slot<D>(at, rows, tile, from, record_from, lane, basis);
  }
  if (record_from >= to) return;
  const int key_end = D * G * p.key_bits / 8 + 4 * D + 2 * G;
  const int record_bytes = (key_end + D * G * p.value_bits / 8 + 2 * D + 4 * G + 127) / 128 * 128;
  const uint8_t* record = p.cache.pages + (int64_t(page) * p.cache.kv_heads + head) * record_bytes;
  const uint8_t* at = record + (side == Side::Key ? 0 : key_end);
  const auto run = [&](auto bits) {
    expand_record<D, G, side, decltype(bits)::value>(at, rows, tile, record_from, to, lane, basis, shared);
  };
  switch (side == Side::Key ? p.key_bits : p.value_bits) {
    case 2: run(Number<2>()); break;
    case 3: run(Number<3>()); break;
    case 4: run(Number<4>()); break;
    default: run(Number<8>());
  }
}

template <int D, int G>
__device__ __forceinline__ void expand(const ExpandParams& p) {
  __shared__ float4 shared[4][D / 4];  // a warp's own
  const int heads = p.cache.kv_heads, warp = blockIdx.x * 4 + threadIdx.x / 32;
  const int first_token = (p.first / kWarpTokens + warp / (2 * heads)) * kWarpTokens, head = warp % heads;
  if (first_token >= p.first + p.tokens) return;
  if (warp / heads % 2 == 0) {
    expand_side<D, G, Side::Key>(p, head, first_token, shared[threadIdx.x / 32]);
  } else {
    expand_side<D, G, Side::Value>(p, head, first_token, shared[threadIdx.x / 32]);
  }
}

}  // namespace kvarn

#define KVARN_EXPAND(D, G)                                                      \
  extern "C" __global__ void __launch_bounds__(128, (D) == 64 ? 4 : (D) == 256 ? 1 : 3) \
      kvarn_expand_d##D##_g##G(const __grid_constant__ kvarn::ExpandParams p) { \
    kvarn::expand<D, G>(p);                                                     \
  }
