// Refit: what stored parameters can repair after rounding.
//
// Prescale keeps small tiles off the normalisation's lower clip; row refit fits scale and zero point to the codes by least
// squares; the token scale makes ⟨x̂, x⟩ = ⟨x, x⟩ for every token.
// Numerics: float32. Sums of codes and of their squares are exact, their variance is formed in integers.
// Cost: 12 operations per element and round, 4 rounds.
#pragma once
#include "quantize.cuh"

namespace kvarn {

constexpr int kRefitRounds = 4;

// The power of two by which a matrix is divided first, so that its std is in [4, 8): floor(log2 std) - 2. 0 for a constant
// matrix.
template <class S>
__device__ __forceinline__ int prescale_exponent(const float (&v)[S::rows][S::columns], char* memory) {
  constexpr int count = S::rows * S::columns;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < S::rows; ++i) {
#pragma unroll
    for (int j = 0; j < S::columns; ++j) sum += v[i][j];
  }
  const float mean = sum * (1.0f / count);
#pragma unroll
  for (int i = 0; i < S::rows; ++i) {
#pragma unroll
    for (int j = 0; j < S::columns; ++j) squares = fmaf(v[i][j] - mean, v[i][j] - mean, squares);
  }
  const Moments of_warp = reduce_lanes(Moments{mean, squares}, 32, Merge(), float(count));
  auto* partial = reinterpret_cast<Moments*>(memory + SealMemory<S>::guard);
  if (lane == 0) partial[warp] = of_warp;
  __syncthreads();
  // Warps need not be a power of two: sum of means, then deviations from their mean.
  const Moments mine = lane < S::warps ? partial[lane] : Moments{0.0f, 0.0f};
  const float all = reduce_lanes(mine.mean, 32, Add()) * (1.0f / S::warps);
  const float apart = lane < S::warps ? mine.mean - all : 0.0f;
  const float total = reduce_lanes(fmaf(32.0f * count * apart, apart, mine.squares), 32, Add());
  const float std = sqrtf(total * (1.0f / (S::R * S::C - 1)));
  __syncthreads();
  return std > 0.0f ? int(__float_as_uint(std) >> 23) - 127 - 2 : 0;
}

// Least squares for scale and zero of each row given its codes, several rounds; the codes of the result are left to to_codes.
template <class S>
__device__ __forceinline__ RowMap refit_rows(const float (&b)[S::rows][S::columns], float4* rows, RowMap map, float max_code) {
  const auto values = [&](int i) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < S::columns; ++j) sum += b[i][j];
    return sum;
  };
  const float mean = reduce_rows<S::rows>(values, Add()) * (1.0f / S::C);
  // What is left of the deviations' sum once the mean is rounded: with it the covariance is right even where the mean is
  // far above the deviations.
  share_rows<S>(rows, 0.0f, 1.0f, mean);
  const auto deviations = [&](int i) {
    const float row_mean = rows[i].w;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < S::columns; ++j) sum += b[i][j] - row_mean;
    return sum;
  };
  const float rest = reduce_rows<S::rows>(deviations, Add());
#pragma unroll 1
  for (int round = 0; round < kRefitRounds; ++round) {
    share_rows<S>(rows, map.zero, map.scale, mean);
    const auto products = [&](int i) {
      const float4 row = rows[i];
      Sum3 sum{0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < S::columns; ++j) {
        const float code = code_of(b[i][j], row, max_code);
        sum.a += code;
        sum.b = fmaf(code, code, sum.b);
        sum.c = fmaf(code, b[i][j] - row.w, sum.c);
      }
      return sum;
    };
    const Sum3 sum = reduce_rows<S::rows>(products, Add());
    // n Σq² - (Σq)² < 2^32 for 256 codes of 8 bits.
    const unsigned codes = static_cast<unsigned>(sum.a);
    const unsigned spread = S::C * static_cast<unsigned>(sum.b) - codes * codes;
    const float variance = static_cast<float>(spread) * (1.0f / (S::C * S::C));
    const float code_mean = sum.a * (1.0f / S::C);
    const float slope = fmaf(-code_mean, rest, sum.c) * (1.0f / S::C) / variance;
    if (variance > 1e-6f && slope > 0.0f) {
      map.scale = slope;
      map.zero = fmaf(-slope, code_mean, fmaf(rest, 1.0f / S::C, mean));
    }
  }
  return map;
}

// ⟨m, m⟩ / ⟨r, m⟩ of a token from its sums {mm, rm, rr}, or `otherwise` where the reconstruction r points elsewhere.
__device__ __forceinline__ float token_scale(const Sum3& sums, float otherwise) {
  const float scale = sums.a / sums.b;
  return sums.b > 0.25f * sqrtf(sums.a) * sqrtf(sums.c) && isfinite(scale) ? scale : otherwise;
}

}  // namespace kvarn
