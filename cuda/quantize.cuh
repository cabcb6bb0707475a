// Round to nearest, per row, of a balanced matrix held in registers.
//
// Numerics: codes are clamp(round_half_even((b - zero) / scale), 0, max_code) with unrounded float32 scale and zero. Divisions
// by a common divisor are a product with its rounded reciprocal and one correction: the correctly rounded quotient in three
// operations (Markstein), barring under- and overflow, which finite halves and scales ≥ 1e-10 exclude.
#pragma once
#include "reduce.cuh"
#include "shape.cuh"

namespace kvarn {

// 1 / x of a normal x whose reciprocal is normal. __frcp_rn would carry a slow path for all others, a call.
__device__ __forceinline__ float reciprocal_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(fmaf(-x, y, 1.0f), y, y);
}

// x / divisor, where reciprocal = 1 / divisor rounded to nearest.
__device__ __forceinline__ float divide(float x, float divisor, float reciprocal) {
  const float quotient = x * reciprocal;
  return fmaf(fmaf(-quotient, divisor, x), reciprocal, quotient);
}

// A row's map between values and codes, in the lane that owns the row.
struct RowMap {
  float scale, zero;
};

// Broadcasts a value of each row owner, with its reciprocal, to the warp: rows[i] = {x, y, 1 / y, z}.
template <class S>
__device__ __forceinline__ void share_rows(float4* rows, float x, float y, float z) {
  __syncwarp();
  const int lane = thread_index() % 32;
  if (lane % S::copies == 0) rows[lane / S::copies] = {x, y, reciprocal_of(y), z};
  __syncwarp();
}

// Range of every row: the scale and zero that map it to the codes.
template <class S>
__device__ __forceinline__ RowMap row_range(const float (&b)[S::rows][S::columns], float max_code) {
  const auto range = [&](int i) {
    Range of{b[i][0], b[i][0]};
#pragma unroll
    for (int j = 1; j < S::columns; ++j) of = {fminf(of.low, b[i][j]), fmaxf(of.high, b[i][j])};
    return of;
  };
  const Range of = reduce_rows<S::rows>(range, Span());
  return {fmaxf((of.high - of.low) / max_code, 1e-10f), of.low};
}

// Code of b, as a float32 integer. `row` is {zero, scale, 1 / scale, …}.
__device__ __forceinline__ float code_of(float b, const float4& row, float max_code) {
  // Adding and subtracting 1.5 · 2^23 rounds to an integer, half to even.
  constexpr float round = 12582912.0f;
  const float x = fminf(fmaxf(divide(b - row.x, row.y, row.z), 0.0f), max_code);
  return __fsub_rn(__fadd_rn(x, round), round);
}

// Replaces b by its codes. `rows`: the warp's, shared.
template <class S>
__device__ __forceinline__ void to_codes(float (&b)[S::rows][S::columns], float4* rows, RowMap map, float max_code) {
  share_rows<S>(rows, map.zero, map.scale, 0.0f);
#pragma unroll
  for (int i = 0; i < S::rows; ++i) {
    const float4 row = rows[i];
#pragma unroll
    for (int j = 0; j < S::columns; ++j) b[i][j] = code_of(b[i][j], row, max_code);
  }
}

}  // namespace kvarn
