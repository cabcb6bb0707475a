// A quarter of a slot (sink or tail tokens in 16 bit) against the queries of an item: one warp, straight from global memory.
//
// Every load is 16 bytes: eight neighbouring channels of one token. For K the channels of two k steps are dealt out to the
// lanes accordingly, those of the queries too, which changes nothing in a sum over channels. For V, 8 x 8 blocks
// are transposed in registers, and the output's rows are a permutation of the channels: see `slot_output_channel`.
//
// Cost: (G/4) D 4 bytes from global memory, read once.
#pragma once
#include "query.cuh"
#include "softmax.cuh"

namespace kvarn {

// Slices of 16 tokens of a quarter.
template <class L>
constexpr int slot_slices = L::G / 64;

// Logits of slices at token `first` on, measured from the softmax's bases. Those of tokens from `stored` on mean nothing:
// what lies there was never stored, and is not read.
template <class L, int NT>
__device__ __forceinline__ void slot_logits(const uint16_t* keys, int first, int stored, const uint4* queries,
                                            const Softmax<NT>& softmax, float unit, float cap, float (&S)[NT][slot_slices<L>][4], int lane) {
  constexpr int D = L::D;
  const int g = lane / 4, c = lane % 4;
  uint32_t x[slot_slices<L>][2][D / 32][4];
#pragma unroll
  for (int t = 0; t < slot_slices<L>; t++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int token = min(first + 16 * t + 8 * half + g, stored - 1);
#pragma unroll
      for (int j = 0; j < D / 32; j++) load128(x[t][half][j], keys + token * D + 32 * j + 8 * c);
    }
#pragma unroll
  for (int b = 0; b < NT; b++)
#pragma unroll
    for (int t = 0; t < slot_slices<L>; t++) {
#pragma unroll
      for (int i = 0; i < 4; i++) S[b][t][i] = 0;
#pragma unroll
      for (int j = 0; j < D / 32; j++) {
        // Channels 32 j + 8 c … of column g, as halves: those of k half c % 2 of k step 2 j + c / 2.
        uint32_t q[4];
        const auto* row = reinterpret_cast<const uint32_t*>(queries + (b * (D / 16) + 2 * j + c / 2) * 32 + 4 * g) + c % 2;
        const int exponent = place(D, L::key_bits, 2 * j + c / 2, c % 2);
        const uint32_t weight = uint32_t(15 + exponent) << 10 | uint32_t(15 + exponent) << 26;
#pragma unroll
        for (int i = 0; i < 4; i++) q[i] = half2_mul(row[4 * i], weight);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32_t a[4] = {x[t][0][j][2 * s], x[t][1][j][2 * s], x[t][0][j][2 * s + 1], x[t][1][j][2 * s + 1]};
          mma(S[b][t], a, q[2 * s], q[2 * s + 1], S[b][t]);
        }
      }
    }
  float units[slot_slices<L>];
#pragma unroll
  for (int t = 0; t < slot_slices<L>; t++) units[t] = unit;
  to_logits(S, units, units, cap, softmax);
}

// Probabilities, their sum and the weighted values. Tokens from `stored` on count as zeros.
template <class L, int NT>
__device__ __forceinline__ void slot_values(const uint16_t* values, int first, int stored, Softmax<NT>& softmax,
                                            float (&S)[NT][slot_slices<L>][4], float (&O)[NT][L::D / 16][4], int lane) {
  constexpr int D = L::D;
  const int g = lane / 4, c = lane % 4;
  softmax.rebase(S, O);
  uint32_t P[NT][slot_slices<L>][2];
#pragma unroll
  for (int b = 0; b < NT; b++) {
    float sums[4] = {};
#pragma unroll
    for (int t = 0; t < slot_slices<L>; t++) {
      probabilities(S[b][t], P[b][t]);
      const uint32_t ones[4] = {0x3C003C00u, 0x3C003C00u, 0x3C003C00u, 0x3C003C00u};
      mma(sums, ones, P[b][t][0], P[b][t][1], sums);
    }
    softmax.sum[b][0] += sums[0], softmax.sum[b][1] += sums[1];
  }
#pragma unroll
  for (int j = 0; j < D / 32; j++)
#pragma unroll
    for (int t = 0; t < slot_slices<L>; t++) {
      uint32_t v[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = first + 16 * t + 8 * half + g;
        load128(v[half], values + (token < stored ? token : 0) * D + 32 * j + 8 * c);
#pragma unroll
        for (int m = 0; m < 4; m++) v[half][m] = transpose8x8(token < stored ? v[half][m] : 0u);
      }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const uint32_t a[4] = {v[0][2 * n], v[0][2 * n + 1], v[1][2 * n], v[1][2 * n + 1]};
#pragma unroll
        for (int b = 0; b < NT; b++) mma(O[b][2 * j + n], a, P[b][t][0], P[b][t][1], O[b][2 * j + n]);
      }
    }
}

// Channel of output row g + 8 half of `block`.
__device__ __forceinline__ int slot_output_channel(int block, int half, int g) {
  return 32 * (block / 2) + 8 * (g / 2) + 2 * (2 * (block % 2) + half) + g % 2;
}

}  // namespace kvarn
