// Reductions over the lanes of a warp, in a fixed order that is the same in every lane, so that copies agree bit by bit.
#pragma once

namespace kvarn {

constexpr unsigned kWholeWarp = 0xffffffffu;

// threadIdx.x and blockIdx.x, read anew at every call: what a step derives from it is then not kept in registers through the other steps,
// where the tile leaves no room.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}
__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// Mean and sum of squared deviations from it. Merging two (Chan, Golub, LeVeque) loses nothing when the mean is far above the
// deviations, like a two-pass variance, and needs one exchange instead of two.
struct Moments {
  float mean, squares;
};

struct Sum3 {
  float a, b, c;
};

struct Range {
  float low, high;
};

__device__ __forceinline__ float exchange(float x, int mask) { return __shfl_xor_sync(kWholeWarp, x, mask); }
__device__ __forceinline__ Moments exchange(Moments x, int mask) { return {exchange(x.mean, mask), exchange(x.squares, mask)}; }
__device__ __forceinline__ Range exchange(Range x, int mask) { return {exchange(x.low, mask), exchange(x.high, mask)}; }
__device__ __forceinline__ Sum3 exchange(Sum3 x, int mask) {
  return {exchange(x.a, mask), exchange(x.b, mask), exchange(x.c, mask)};
}

__device__ __forceinline__ float choose(bool first, float a, float b) { return first ? a : b; }
__device__ __forceinline__ Moments choose(bool first, Moments a, Moments b) { return first ? a : b; }
__device__ __forceinline__ Range choose(bool first, Range a, Range b) { return first ? a : b; }
__device__ __forceinline__ Sum3 choose(bool first, Sum3 a, Sum3 b) { return first ? a : b; }

// Merges of two values; `count` is the number of elements behind each.
struct Add {
  __device__ __forceinline__ float operator()(float x, float y, float) const { return x + y; }
  __device__ __forceinline__ Sum3 operator()(Sum3 x, Sum3 y, float) const { return {x.a + y.a, x.b + y.b, x.c + y.c}; }
};
struct Span {
  __device__ __forceinline__ Range operator()(Range x, Range y, float) const {
    return {fminf(x.low, y.low), fmaxf(x.high, y.high)};
  }
};
struct Merge {
  __device__ __forceinline__ Moments operator()(Moments x, Moments y, float count) const {
    const float delta = x.mean - y.mean;
    return {0.5f * (x.mean + y.mean), fmaf(delta * delta, 0.5f * count, x.squares + y.squares)};
  }
};

// Of N values that every lane computes (`leaf(i)`, `count` elements behind each), the part of index `i` once `n` are left.
// Depth first: few values are alive at a time, which N of them would not leave registers for.
template <int N, int n, int i, class Leaf, class Op>
__device__ __forceinline__ auto reduce_part(const Leaf& leaf, Op op, float count, int lane) {
  if constexpr (n == N) {
    return leaf(i);
  } else {
    const auto low = reduce_part<N, 2 * n, i>(leaf, op, count, lane);
    const auto high = reduce_part<N, 2 * n, i + n>(leaf, op, count, lane);
    constexpr int mask = 32 * n / N;
    const bool upper = lane & mask;
    return op(choose(upper, high, low), exchange(choose(upper, low, high), mask), count * (N / 2 / n));
  }
}

// Reduces N values over the warp. Lane l gets the result of value l / (32 / N): each exchange halves the values that a lane
// still carries, so N values cost little more than one.
template <int N, class Leaf, class Op>
__device__ __forceinline__ auto reduce_rows(const Leaf& leaf, Op op, float count = 1.0f) {
  auto x = reduce_part<N, 1, 0>(leaf, op, count, thread_index());
#pragma unroll
  for (int mask = 16 / N; mask > 0; mask /= 2) x = op(x, exchange(x, mask), count * (16 / mask));
  return x;
}

// Reduces one value over `lanes` neighbouring lanes.
template <class T, class Op>
__device__ __forceinline__ T reduce_lanes(T x, int lanes, Op op, float count = 1.0f) {
  for (int mask = 1; mask < lanes; mask *= 2) {
    x = op(x, exchange(x, mask), count);
    count *= 2.0f;
  }
  return x;
}

// Smallest and largest of values ≥ 0, whose bits order like integers.
__device__ __forceinline__ float warp_minimum(float x) {
  return __uint_as_float(__reduce_min_sync(kWholeWarp, __float_as_uint(x)));
}
__device__ __forceinline__ float warp_maximum(float x) {
  return __uint_as_float(__reduce_max_sync(kWholeWarp, __float_as_uint(x)));
}

}  // namespace kvarn
