// Brings one side of a tile into shared memory as halves: from its slot, from rows of this step, or some of both.
//
// Data: slot [G][D] halves, rotated; rows in the caller's tensor. Tokens from `from_row_token` on come with the rows, are
// rotated here and rounded to half: the bits that the row blocks of the same launch write to slots, so the record does not
// depend on who runs first. Shared: token after token, SealMemory::token_halves apart.
// Threads: 16 bytes per lane, vector_lanes<D> lanes per token, several tokens in flight.
// Counts: a row that is kept in a slot is counted by the block that writes it there, any other row here.
#pragma once
#include "reduce.cuh"
#include "rotate.cuh"
#include "shape.cuh"
#include "store.cuh"

namespace kvarn {

template <class S>
__device__ __forceinline__ void write_staged(char* memory, int token, int channel, uint4 raw) {
  if constexpr (S::side == Side::Key) {
    // Tokens are an odd number of words apart: no 16-byte stores.
    uint32_t* at = reinterpret_cast<uint32_t*>(memory) + token * (SealMemory<S>::token_halves / 2) + channel / 2;
    at[0] = raw.x;
    at[1] = raw.y;
    at[2] = raw.z;
    at[3] = raw.w;
  } else {
    *reinterpret_cast<uint4*>(memory + 2 * (token * SealMemory<S>::token_halves + channel)) = raw;
  }
}

template <class S>
__device__ __forceinline__ void stage_tile(const AppendParams& p, const Seal& seal, int head, char* memory) {
  constexpr int D = S::D, G = S::G, lanes = vector_lanes<D>, step = S::threads / lanes, at_once = 2;
  const int thread = thread_index();
  const Tensor& tensor = S::side == Side::Key ? p.k : p.v;
  const int channel = thread % lanes * 8;
  const uint16_t* slot =
      p.cache.slots + ((int64_t(seal.slot) * p.cache.kv_heads + head) * 2 + (S::side == Side::Value)) * (G * D);
  Counts counts;
#pragma unroll 1
  for (int first = thread / lanes; first < G; first += at_once * step) {
    uint4 raw[at_once];
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int token = first + i * step;
      raw[i] = uint4{0, 0, 0, 0};
      if (token >= G || channel >= D) continue;
      raw[i] = token < seal.from_row_token
                   ? __ldg(reinterpret_cast<const uint4*>(slot + token * D + channel))
                   : load_raw(tensor, seal.row + (token - seal.from_row_token), head, channel);
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i) {
      const int token = first + i * step;
      const bool from_row = token >= seal.from_row_token && token < G;
      if (__any_sync(0xffffffffu, from_row)) {
        float x[8];
        to_floats(raw[i], p.dtype, x);
        Counts met;
        make_finite(x, met);
        if (!p.rotated) rotate<D>(x);
        const uint4 rounded = round_halves(x, met);
        if (from_row) {
          raw[i] = rounded;
          if (p.slot_of_row[seal.row + (token - seal.from_row_token)] < 0) {
            counts.non_finite += met.non_finite;
            counts.saturated += met.saturated;
          }
        }
      }
      if (token < G && channel < D) write_staged<S>(memory, token, channel, from_row ? raw[i] : finite_halves(raw[i], counts));
    }
  }
  add_counts(p.counts, counts);
}

// The thread's elements of the staged matrix, as float32.
template <class S>
__device__ __forceinline__ void load_staged(const char* memory, float (&v)[S::rows][S::columns]) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const __half* tile = reinterpret_cast<const __half*>(memory);
#pragma unroll
  for (int j = 0; j < S::columns; ++j) {
    const int column = 32 * j + lane;
    if constexpr (S::side == Side::Key) {
#pragma unroll
      for (int i = 0; i < S::rows; i += 2) {  // rows i and i + 1 are neighbouring channels
        const int at = column * SealMemory<S>::token_halves + S::row(warp, i);
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(tile + at));
        v[i][j] = pair.x;
        v[i + 1][j] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::rows; ++i) v[i][j] = __half2float(tile[S::row(warp, i) * SealMemory<S>::token_halves + column]);
    }
  }
}

}  // namespace kvarn
