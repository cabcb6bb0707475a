// Running softmax of one warp over tiles, in base 2.
//
// For each query column: `base` is what logits are measured from, `sum` the sum of p = 2^(logit - base), and the output
// accumulates p times values. The base is not the running maximum: it is chosen so that the first tile's largest p is
// 2^kHeadroom, and moved only when a tile's sum of p grows too large for half precision; the tile is then redone. Most
// tiles never look for a maximum.
#pragma once
#include "mma.cuh"

namespace kvarn {

constexpr int kHeadroom = 4;          // probabilities are held times up to 2^4 at first
constexpr float kLargestSum = 8192;   // a tile's sum of p that makes it be redone; 128 tokens stay within half range

// State of NT blocks of 8 columns; lane l = 4 g + c keeps columns 2 c and 2 c + 1.
template <int NT>
struct Softmax {
  float base[NT][2];
  float sum[NT][2];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int b = 0; b < NT; b++) base[b][0] = base[b][1] = sum[b][0] = sum[b][1] = 0;
  }

  // Whether some column has summed nothing yet.
  __device__ __forceinline__ bool empty() const {
    bool any = false;
#pragma unroll
    for (int b = 0; b < NT; b++) any |= sum[b][0] == 0.0f || sum[b][1] == 0.0f;
    return any;
  }

  // Moves the bases to fit the logits S (measured from the old bases), and S, sums and outputs O with them.
  template <int MT, int Blocks>
  __device__ __forceinline__ void rebase(float (&S)[NT][MT][4], float (&O)[NT][Blocks][4]) {
#pragma unroll
    for (int b = 0; b < NT; b++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float m = -INFINITY;
#pragma unroll
        for (int t = 0; t < MT; t++) m = fmaxf(m, fmaxf(S[b][t][i], S[b][t][2 + i]));
#pragma unroll
        for (int o = 4; o < 32; o *= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, o));
        float move = m - kHeadroom;
        if (sum[b][i] != 0.0f) move = fmaxf(move, 0.0f);  // what is summed already must not grow
        if (m == -INFINITY) move = 0;                     // the column sees nothing of this tile
        const float factor = sum[b][i] != 0.0f ? exp2_approx(-move) : 1.0f;
        base[b][i] += move;
        sum[b][i] *= factor;
#pragma unroll
        for (int t = 0; t < MT; t++) S[b][t][i] -= move, S[b][t][2 + i] -= move;
#pragma unroll
        for (int d = 0; d < Blocks; d++) O[b][d][i] *= factor, O[b][d][2 + i] *= factor;
      }
  }
};

// Probabilities of a 16-token slice as B operand: k = tokens, columns = queries.
__device__ __forceinline__ void probabilities(const float (&S)[4], uint32_t (&P)[2]) {
  P[0] = transpose8x8(pack_half2(exp2_approx(S[0]), exp2_approx(S[1])));
  P[1] = transpose8x8(pack_half2(exp2_approx(S[2]), exp2_approx(S[3])));
}

// Which tokens a column may see: positions [low, high).
struct Visible {
  int low, high;
};

// What query token `token` of an item may see of the first `stored` positions.
__device__ __forceinline__ Visible visible(int position, int token, int window, int stored) {
  const int at = position + token;
  return {at >= window ? at - window + 1 : 0, min(at + 1, stored)};
}

// Logits of tokens that a column may not see become -inf. `first` is the position of slice 0's row 0; `none` columns (past
// the last one) are left alone.
template <int NT, int MT>
__device__ __forceinline__ void mask(float (&S)[NT][MT][4], int first, int group, int position, int window, int stored, int from, int lane) {
  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int b = 0; b < NT; b++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Visible v = visible(position, (8 * b + 2 * c + i) / group, window, stored);
      v.low = max(v.low, from);
#pragma unroll
      for (int t = 0; t < MT; t++) {
        const int row = first + 16 * t + g;
        if (row < v.low || row >= v.high) S[b][t][i] = -INFINITY;
        if (row + 8 < v.low || row + 8 >= v.high) S[b][t][2 + i] = -INFINITY;
      }
    }
}

// Soft cap of a logit in base 2: cap * tanh(x / cap), with cap in base 2 as well.
__device__ __forceinline__ float soft_cap(float x, float cap) {
  const float e = exp2_approx(fminf(fabsf(x) * (2.0f * 1.4426950408889634f) / cap, 126.0f));
  return copysignf(cap - 2.0f * cap / (e + 1.0f), x);
}

// A sum of products to a logit measured from `base`.
__device__ __forceinline__ float to_logit(float sum, float scale, float cap, float base) {
  return cap == 0.0f ? fmaf(sum, scale, -base) : soft_cap(sum * scale, cap) - base;
}

}  // namespace kvarn
