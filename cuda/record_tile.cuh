// One record tile against the queries of an item: one warp, codes straight into the tensor cores.
//
//   S[t, h] = s_tok[t] (sum_d Q'[d, h] q[d, t] + c_h),   Q' = Q s_chan,   c_h = sum_d Q[d, h] z_chan[d]
//   O[d, h] += s_chan[d] (sum_t P'[t, h] q[t, d] + e_h),  P' = p s_tok,    e_h = sum_t p[t, h] z_tok[t]
//
// Zero points enter by products of their own whose rows are replicated: for K, rows g carry z_chan of k half 0 and rows
// g + 8 those of k half 1, which separates the place values; for V, rows g carry z_tok and rows g + 8 ones, which gives
// e_h and the softmax denominator together.
//
// Codes count from the middle of their range: with m = 2^(bits - 1), zero points become z + m s and -m Q' (-m P') is added
// by one more product each. Sums of codes then no longer nearly cancel against zero points, which would multiply the
// rounding of Q' and P' to half by the distance of the codes from zero.
//
// Cost per tile: bytes of the record from shared memory once; (G/16)(D/16)(2 NT) code products and (D/16 + G/16) NT more.
#pragma once
#include "codes.cuh"
#include "query.cuh"
#include "softmax.cuh"

namespace kvarn {

// Parameters of 2 n halves in k order that lane 4 g + c reads: 4 n bytes at c * 4 n (n: 16-blocks).
template <int Blocks>
__device__ __forceinline__ void load_k_order(uint32_t (&r)[2 * Blocks], const unsigned char* array, int c) {
#pragma unroll
  for (int i = 0; i < 2 * Blocks; i += 4) load128(r + i, array + c * Blocks * 8 + i * 4);
}
template <int Blocks>
__device__ __forceinline__ void load_row_order(uint32_t (&r)[Blocks], const unsigned char* array, int g) {
  if constexpr (Blocks % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Blocks; i += 4) load128(r + i, array + g * Blocks * 4 + i * 4);
  } else {
#pragma unroll
    for (int i = 0; i < Blocks; i += 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(array + g * Blocks * 4 + i * 4);
      r[i] = v.x, r[i + 1] = v.y;
    }
  }
}

// Logits of a tile in base 2, measured from the softmax's bases. `keys` is the K part of a record in shared memory; `unit`
// undoes the queries' power of two and the codes' weight, `cap` is the soft cap in base 2, 0 for none.
template <class L, int NT>
__device__ __forceinline__ void record_logits(const unsigned char* keys, const uint4* queries, const Softmax<NT>& softmax,
                                              float unit, float cap, float (&S)[NT][L::G / 16][4], int lane) {
  constexpr int D = L::D, G = L::G, B = L::key_bits, KT = D / 16, MT = G / 16;
  constexpr int kinds = place_kinds<D, B>();
  constexpr bool mixed = mixed_places(D, B);
  constexpr uint32_t middle = half2_power(B - 1), minus_middle = middle | 0x80008000u;
  const int g = lane / 4, c = lane % 4;
  uint32_t q[NT][KT][2];
  float seed[NT][4];
  {
    uint32_t scale[2 * KT], zero[2 * KT];
    load_k_order<KT>(scale, keys + L::key_channel_scale, c);
    load_k_order<KT>(zero, keys + L::key_channel_zero, c);
#pragma unroll
    for (int b = 0; b < NT; b++) {
      // Several chains of products: one would be bound by its latency.
      float cz[kinds][2][2][4] = {};
#pragma unroll
      for (int k = 0; k < KT; k++) {
        uint32_t query[4];  // of two k halves, then what their rounding left
        load128(query, queries + (b * KT + k) * 32 + lane);
        float(&c_h)[2][4] = cz[place_kind<D, B>(k)][kinds == 1 ? k % 2 : k / 2 % 2];
        const uint32_t az[4] = {half2_fma(scale[2 * k], middle, zero[2 * k]), 0u, 0u,
                                half2_fma(scale[2 * k + 1], middle, zero[2 * k + 1])};
        mma(c_h[0], az, query[0], query[1], c_h[0]);
        // Rounded once: products of twice rounded queries miss the contract.
        q[b][k][0] = half2_fma(query[0], scale[2 * k], half2_mul(query[2], scale[2 * k]));
        q[b][k][1] = half2_fma(query[1], scale[2 * k + 1], half2_mul(query[3], scale[2 * k + 1]));
        const uint32_t am[4] = {minus_middle, 0u, 0u, minus_middle};
        mma(c_h[1], am, q[b][k][0], q[b][k][1], c_h[1]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float s = 0;
#pragma unroll
        for (int kind = 0; kind < kinds; kind++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            s = fmaf((cz[kind][0][0][2 * half + i] + cz[kind][1][0][2 * half + i]) +
                         (cz[kind][0][1][2 * half + i] + cz[kind][1][1][2 * half + i]),
                     power_of_two(place(D, B, kind_example<B>(kind), half) + kSubnormal), s);
        seed[b][i] = seed[b][2 + i] = s;
      }
    }
  }
  constexpr int load = slices_per_load(D, G, B), words = words_of(D, B, load);
  constexpr int step = load < 4 && words_of(D, B, 4) <= 40 && MT >= 4 ? 4 : load;  // slices in flight: independent chains
#pragma unroll
  for (int t = 0; t < MT; t += step) {
    uint32_t w[step / load][words];
#pragma unroll
    for (int i = 0; i < step; i += load) load_words<D, G, B, load>(w[i / load], keys + L::key_codes, t + i, lane);
#pragma unroll
    for (int k = 0; k < KT; k++)
#pragma unroll
      for (int i = 0; i < step; i++) {
        uint32_t f[4];
        expand_codes<B, true, mixed>(w[i / load], i % load * KT + k, f);
#pragma unroll
        for (int b = 0; b < NT; b++) mma(S[b][t + i], f, q[b][k][0], q[b][k][1], k ? S[b][t + i] : seed[b]);
      }
  }
  uint32_t token[MT];
  load_row_order<MT>(token, keys + L::key_token_scale, g);
  float low[MT], high[MT];
#pragma unroll
  for (int t = 0; t < MT; t++) {
    const float2 s = unpack_half2(token[t]);
    low[t] = s.x * unit, high[t] = s.y * unit;
  }
  to_logits(S, low, high, cap, softmax);
}

// Adds a tile's values, weighted by the probabilities of its logits S (measured from the softmax's bases), to O. O comes
// in units of 2^(place + kSubnormal) by output row: see `record_output_unit`.
template <class L, int NT>
__device__ __forceinline__ void record_values(const unsigned char* values, Softmax<NT>& softmax, float (&S)[NT][L::G / 16][4],
                                              float (&O)[NT][L::D / 16][4], int lane) {
  constexpr int D = L::D, G = L::G, B = L::value_bits, DT = D / 16, MT = G / 16, origin = L::value_codes;
  constexpr int kinds = place_kinds<D, B>();
  constexpr bool mixed = mixed_places(D, B);
  constexpr uint32_t middle = half2_power(B - 1), minus_middle = middle | 0x80008000u;
  const int g = lane / 4, c = lane % 4;
  uint32_t P[NT][MT][2];
  float ez[NT][2][4];
  bool redo = softmax.empty();
#pragma unroll 1
  while (true) {
    if (__any_sync(kFullWarp, redo)) softmax.rebase(S, O);
    redo = false;
    uint32_t zero[2 * MT], scale[2 * MT];
    load_k_order<MT>(zero, values + L::value_token_zero - origin, c);
    load_k_order<MT>(scale, values + L::value_token_scale - origin, c);
#pragma unroll
    for (int b = 0; b < NT; b++) {
#pragma unroll
      for (int i = 0; i < 8; i++) ez[b][i / 4][i % 4] = 0;
#pragma unroll
      for (int t = 0; t < MT; t++) {
        probabilities(S[b][t], P[b][t]);
        const uint32_t az[4] = {half2_fma(scale[2 * t], middle, zero[2 * t]), 0x3C003C00u,
                                half2_fma(scale[2 * t + 1], middle, zero[2 * t + 1]), 0x3C003C00u};
        mma(ez[b][t % 2], az, P[b][t][0], P[b][t][1], ez[b][t % 2]);
      }
      redo |= ez[b][0][2] + ez[b][1][2] > kLargestSum || ez[b][0][3] + ez[b][1][3] > kLargestSum;
    }
    if (!__any_sync(kFullWarp, redo)) break;
  }
  float seed[NT][kinds][4];
  {
    uint32_t scale[2 * MT];
    load_k_order<MT>(scale, values + L::value_token_scale - origin, c);
#pragma unroll
    for (int b = 0; b < NT; b++) {
      float em[2][4] = {};
#pragma unroll
      for (int t = 0; t < MT; t++) {
        P[b][t][0] = half2_mul(P[b][t][0], scale[2 * t]);
        P[b][t][1] = half2_mul(P[b][t][1], scale[2 * t + 1]);
        const uint32_t am[4] = {minus_middle, 0u, minus_middle, 0u};
        float(&chain)[4] = t % 4 < 2 ? ez[b][t % 2] : em[t % 2];
        mma(chain, am, P[b][t][0], P[b][t][1], chain);
      }
      softmax.sum[b][0] += ez[b][0][2] + ez[b][1][2];
      softmax.sum[b][1] += ez[b][0][3] + ez[b][1][3];
#pragma unroll
      for (int kind = 0; kind < kinds; kind++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            seed[b][kind][2 * half + i] =
                ((ez[b][0][i] + ez[b][1][i]) + (em[0][i] + em[1][i])) * power_of_two(place(D, B, kind_example<B>(kind), half) + kSubnormal);
    }
  }
  float A[NT][DT][4];
  constexpr int load = slices_per_load(D, G, B), words = words_of(D, B, load);
#pragma unroll
  for (int t = 0; t < MT; t += load) {
    uint32_t w[words];
    load_words<D, G, B, load>(w, values + L::value_codes - origin, t, lane);
#pragma unroll
    for (int i = 0; i < load; i++)
#pragma unroll
      for (int d = 0; d < DT; d++) {
        uint32_t f[4];
        expand_codes<B, false, mixed>(w, i * DT + d, f);
#pragma unroll
        for (int b = 0; b < NT; b++)
          mma(A[b][d], f, P[b][t + i][0], P[b][t + i][1], t + i ? A[b][d] : seed[b][place_kind<D, B>(d)]);
      }
  }
  uint32_t scale[DT];
  load_row_order<DT>(scale, values + L::value_channel_scale - origin, g);
#pragma unroll
  for (int d = 0; d < DT; d++) {
    const float2 s = unpack_half2(scale[d]);
#pragma unroll
    for (int b = 0; b < NT; b++) {
      O[b][d][0] = fmaf(A[b][d][0], s.x, O[b][d][0]), O[b][d][1] = fmaf(A[b][d][1], s.x, O[b][d][1]);
      O[b][d][2] = fmaf(A[b][d][2], s.y, O[b][d][2]), O[b][d][3] = fmaf(A[b][d][3], s.y, O[b][d][3]);
    }
  }
}

// What O[.][block][2 half ..] of record tiles must be multiplied by.
template <class L>
__device__ __forceinline__ float record_output_unit(int block, int half) {
  return power_of_two(-place(L::D, L::value_bits, block, half) - kSubnormal);
}

}  // namespace kvarn
