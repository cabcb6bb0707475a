// Dual-axis variance normalisation (KVarN, arXiv 2606.03458, Algorithm 1) of a matrix held in registers.
//
// Columns and rows are divided in turn by their standard deviation, in log space; the iterate with the smallest imbalance is
// kept. A column's std of the scaled matrix is its scale times the std over rows of v / row scales, so an iteration is one
// pass over the rows and one over the columns, without divisions, and the imbalance's column std is the next iteration's.
//
// Data: v [rows][columns] of each thread (shape.cuh); scales in shared memory (columns) and in the lanes that own them (rows).
// Threads: rows within a warp; columns through shared memory, `owners` threads per column. Two barriers per iteration.
// Numerics: float32; Moments instead of two passes; accurate logf and expf; ties go to the later iterate, NaN never wins.
// Cost: 8 operations per element and iteration.
#pragma once
#include "reduce.cuh"
#include "shape.cuh"

namespace kvarn {

// Adds ln std to a log scale. Bounds as published.
__device__ __forceinline__ float advance(float log, float std) {
  const float growth = logf(fminf(fmaxf(std, 1e-3f), 1e3f));
  return fminf(fmaxf(log + growth, -0.3f), 10.0f);
}

// std of every row of v · column_inverse; lane l gets that of row l / copies.
template <class S>
__device__ __forceinline__ float row_std(const float (&v)[S::rows][S::columns], const float (&column_inverse)[S::columns]) {
  const auto moments = [&](int i) {
    float x[S::columns], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < S::columns; ++j) sum += x[j] = v[i][j] * column_inverse[j];
    const float mean = sum * (1.0f / S::columns);
#pragma unroll
    for (int j = 0; j < S::columns; ++j) squares = fmaf(x[j] - mean, x[j] - mean, squares);
    return Moments{mean, squares};
  };
  return sqrtf(reduce_rows<S::rows>(moments, Merge(), float(S::columns)).squares * (1.0f / (S::C - 1)));
}

// Moments of the warp's part of every column, to shared memory.
template <class S>
__device__ __forceinline__ void column_partials(const float (&v)[S::rows][S::columns], float row_inverse, Moments* partial) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  float inverse[S::rows];
#pragma unroll
  for (int i = 0; i < S::rows; ++i) inverse[i] = __shfl_sync(kWholeWarp, row_inverse, i * S::copies);
#pragma unroll
  for (int j = 0; j < S::columns; ++j) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < S::rows; ++i) sum = fmaf(v[i][j], inverse[i], sum);
    const float mean = sum * (1.0f / S::rows);
#pragma unroll
    for (int i = 0; i < S::rows; ++i) {
      const float deviation = fmaf(v[i][j], inverse[i], -mean);
      squares = fmaf(deviation, deviation, squares);
    }
    partial[warp * (S::C + 1) + 32 * j + lane] = {mean, squares};
  }
}

// std of the column that the thread owns with its neighbours, from the warps' moments.
template <class S>
__device__ __forceinline__ float column_std(const Moments* partial) {
  const int thread = thread_index(), column = thread / S::owners, part = thread % S::owners;
  Moments of[S::partials];
  float mean = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < S::partials; ++i) {
    of[i] = partial[(part * S::partials + i) * (S::C + 1) + column];
    mean += of[i].mean;
    squares += of[i].squares;
  }
  mean *= 1.0f / S::partials;
#pragma unroll
  for (int i = 0; i < S::partials; ++i) squares = fmaf(float(S::rows) * (of[i].mean - mean), of[i].mean - mean, squares);
  const Moments all = reduce_lanes(Moments{mean, squares}, S::owners, Merge(), float(S::rows * S::partials));
  return sqrtf(all.squares * (1.0f / (S::R - 1)));
}

// Smallest and largest std of a warp, to shared memory.
__device__ __forceinline__ void write_spread(float std, float2* spread) {
  const float low = warp_minimum(std), high = warp_maximum(std);
  const int thread = thread_index();
  if (thread % 32 == 0) spread[thread / 32] = {low, high};
}

// Ratio of the largest to the smallest std, from what `warps` warps wrote.
__device__ __forceinline__ float read_spread(const float2* spread, int warps) {
  const float2 mine = spread[min(thread_index() % 32, warps - 1)];
  return warp_maximum(mine.y) / fmaxf(warp_minimum(mine.x), 1e-8f);
}

// Leaves the scales of the kept iterate in shared memory: SealMemory::column, and row_scale in the order of the warps' rows.
template <class S>
__device__ __forceinline__ void normalize(const float (&v)[S::rows][S::columns], int iterations, char* memory) {
  using At = SealMemory<S>;
  constexpr int owning = S::C * S::owners;  // threads
  auto* partial = reinterpret_cast<Moments*>(memory + At::partial);
  auto* column_inverse = reinterpret_cast<float*>(memory + At::column);
  auto* column_spread = reinterpret_cast<float2*>(memory + At::column_spread);

  auto* best_column = reinterpret_cast<float*>(memory + At::column_log);
  auto* best_row = reinterpret_cast<float*>(memory + At::row_scale);
  float best_imbalance = 0.0f;
  float column_log = 0.0f, next_column_log = 0.0f, row_log = 0.0f, row_inverse = 1.0f;
#pragma unroll 1
  for (int iterate = 0; iterate <= iterations; ++iterate) {
    // Two sets in turn: a fast warp may write the next iterate's while a slow one still reads.
    auto* row_spread = reinterpret_cast<float2*>(memory + At::row_spread) + 32 * (iterate & 1);
    float inverse[S::columns];
#pragma unroll
    for (int j = 0; j < S::columns; ++j) inverse[j] = iterate == 0 ? 1.0f : column_inverse[32 * j + thread_index() % 32];
    float std = row_std<S>(v, inverse) * row_inverse;
    if (iterate > 0) {
      row_log = advance(row_log, std);
      const float updated = expf(-row_log);
      std *= updated / row_inverse;
      row_inverse = updated;
    }
    write_spread(std, row_spread);
    column_partials<S>(v, row_inverse, partial);
    __syncthreads();
    if (thread_index() < owning) {
      const float std = column_std<S>(partial) * (iterate == 0 ? 1.0f : column_inverse[thread_index() / S::owners]);
      write_spread(std, column_spread);
      column_log = next_column_log;
      next_column_log = advance(column_log, std);
      // The column's owners are lanes of one warp: all have read before one writes.
      __syncwarp();
      const int thread = thread_index();
      if (thread % S::owners == 0) column_inverse[thread / S::owners] = expf(-next_column_log);
    }
    __syncthreads();
    const float imbalance = read_spread(column_spread, owning / 32) + read_spread(row_spread, S::warps);
    if (iterate == 0 || imbalance <= best_imbalance) {
      best_imbalance = imbalance;
      const int thread = thread_index();
      if (thread < owning && thread % S::owners == 0) best_column[thread / S::owners] = column_log;
      if (thread % S::copies == 0) best_row[thread / S::copies] = row_log;
    }
  }
  // Every thread has read the last inverses before the last barrier.
  const int thread = thread_index();
  if (thread < owning && thread % S::owners == 0) column_inverse[thread / S::owners] = expf(best_column[thread / S::owners]);
  if (thread % S::copies == 0) best_row[thread / S::copies] = expf(best_row[thread / S::copies]);
  __syncthreads();
}

}  // namespace kvarn
