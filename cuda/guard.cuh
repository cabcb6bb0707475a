// Range guards: a power of two moved from the rows' parameters to the columns' scale, so that a decode kernel's pre-scaled
// queries and probabilities stay within half range. Costs nothing at decode.
#pragma once
#include "mma.cuh"
#include "reduce.cuh"
#include "shape.cuh"
#include "store.cuh"

namespace kvarn {

// The exponent k: rows are multiplied by 2^-k, columns by 2^k. `row` = max(max scale, max |zero| / 1024), rounded to 11
// significant bits, becomes a number in [1/2, 1); k is less where the largest column scale would exceed 65504.
__device__ __forceinline__ int guard_exponent(float row, float column) {
  if (!(row > 0.0f) || !isfinite(row)) return 0;
  const uint32_t bits = __float_as_uint(row);
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u);
  const int exponent = int(rounded >> 23) - 127 + 1;
  if (!(column > 0.0f) || !isfinite(column)) return exponent;
  // With 11 significant bits, 2^e … is at most 65504 · 2^(e - 15).
  const uint32_t column_bits = __float_as_uint(column);
  const int limit = 15 - (int((column_bits + 0xfffu + (column_bits >> 13 & 1u)) >> 23) - 127);
  return min(exponent, limit);
}

// Parameters on their way to halves: of the row and of the column that the thread owns.
struct Parameters {
  float row_scale, row_zero, column_scale;
};

// Guards the parameters of a matrix. `memory`: float[64], not used by another guard of the same tile.
template <class S>
__device__ __forceinline__ void guard(Parameters& of, float* memory) {
  constexpr int owning = S::C * S::owners / 32;  // warps
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const float row = warp_maximum(fmaxf(of.row_scale, fabsf(of.row_zero) * (1.0f / 1024.0f)));
  if (lane == 0) memory[warp] = row;
  if (warp < owning) {
    const float column = warp_maximum(of.column_scale);
    if (lane == 0) memory[32 + warp] = column;
  }
  __syncthreads();
  const float largest_row = warp_maximum(memory[min(lane, S::warps - 1)]);
  const float largest_column = warp_maximum(memory[32 + min(lane, owning - 1)]);
  const int exponent = guard_exponent(largest_row, largest_column);
  const float down = power_of_two(-exponent), up = power_of_two(exponent);
  of.row_scale *= down;
  of.row_zero *= down;
  of.column_scale *= up;
}

}  // namespace kvarn
