// From the partial results of warps and thread blocks to the output.
//
// A partial result is (max, sum, out): out / sum is attention over some of the keys, max what logits were measured from,
// base 2. Merges happen in a fixed order: the four warps of a block, then the parts of a query block by index, done by the
// thread block that arrives last. How a sequence is cut into parts depends on its own length only, so a result does not
// depend on the batch.
#pragma once
#include "query.cuh"

namespace kvarn {

// One query column spread over a warp: out[i] of lane l belongs to channel 32 i + l.
template <int D>
struct Column {
  float out[D / 32];
  float max, sum;

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < D / 32; i++) out[i] = 0;
    max = -INFINITY, sum = 0;
  }

  // Adds a partial result whose values are read by `load(i)`.
  template <class Load>
  __device__ __forceinline__ void add(float other_max, float other_sum, Load load) {
    const float m = fmaxf(max, other_max);
    const float ours = sum != 0.0f ? exp2_approx(max - m) : 0.0f;
    const float theirs = other_sum != 0.0f ? exp2_approx(other_max - m) : 0.0f;
    if (other_sum != 0.0f || sum != 0.0f) max = m;
    sum = sum * ours + other_sum * theirs;
#pragma unroll
    for (int i = 0; i < D / 32; i++) out[i] = out[i] * ours + (other_sum != 0.0f ? load(i) * theirs : 0.0f);
  }
};

// Writes a column's output: attention-sink logit, division, rotation back, conversion, log-sum-exp.
template <int D>
__device__ __forceinline__ void write_column(const AttendParams& p, const Item& item, int head, int column, Column<D>& result) {
  const int lane = threadIdx.x % 32;
  const int row = item.query_row + column / p.group, query_head = head * p.group + column % p.group;
  if (p.sink_logits) {
    const float logit = p.sink_logits[query_head] * kLog2E;
    if (logit > -INFINITY) result.add(logit, 1.0f, [](int) { return 0.0f; });
  }
  if (p.lse && lane == 0)
    p.lse[int64_t(row) * p.cache.kv_heads * p.group + query_head] = (result.max + log2f(result.sum)) / kLog2E;
  const float factor = result.sum != 0.0f ? 1.0f / result.sum : 0.0f;
#pragma unroll
  for (int i = 0; i < D / 32; i++) result.out[i] *= factor;
  if (!p.rotated) rotate_warp<D>(result.out, lane);
  const int64_t at = row * p.out.row_stride + int64_t(query_head) * p.out.head_stride + lane;
#pragma unroll
  for (int i = 0; i < D / 32; i++) store_element(p.out, at + 32 * i, p.dtype, result.out[i]);
}

// Where warps leave their partial results: [warp][column][kRow] and, behind, [warp][column] of (max, sum).
template <int D, int NT>
struct WarpResults {
  static constexpr int row = D + 4;  // keeps the lanes of a fragment apart in the banks
  static constexpr int bytes = 4 * 8 * NT * (row + 2) * 4;
  float* out;
  float2* max_sum;

  __device__ __forceinline__ explicit WarpResults(unsigned char* memory)
      : out(reinterpret_cast<float*>(memory)), max_sum(reinterpret_cast<float2*>(memory + 4 * 8 * NT * row * 4)) {}
};

// Merges the warps' results of every column and hands them on: to the output if they are all there is, else to the
// workspace; the block that arrives last merges the workspace. All threads call, after a barrier.
template <int D, int NT>
__device__ __forceinline__ void combine(const AttendParams& p, const Item& item, int head, const WarpResults<D, NT>& warps, int* flag) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = item.query_tokens * p.group;
  const int64_t part_stride = int64_t(p.cache.kv_heads) * p.columns;
  const int64_t first = (int64_t(item.first_part) * p.cache.kv_heads + head) * p.columns;
  for (int column = warp; column < columns; column += 4) {
    Column<D> result;
    result.init();
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float2 ms = warps.max_sum[w * 8 * NT + column];
      result.add(ms.x, ms.y, [&](int i) { return warps.out[(w * 8 * NT + column) * warps.row + 32 * i + lane]; });
    }
    if (item.parts == 1) {
      write_column<D>(p, item, head, column, result);
    } else {
      const int64_t at = first + item.part * part_stride + column;
#pragma unroll
      for (int i = 0; i < D / 32; i++) p.partial_out[at * D + 32 * i + lane] = result.out[i];
      if (lane == 0) reinterpret_cast<float2*>(p.partial_max_sum)[at] = make_float2(result.max, result.sum);
    }
  }
  if (item.parts == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Acquire and release: what all blocks of these parts wrote is visible to the one that arrives last.
    int32_t* counter = p.counters + item.counter * p.cache.kv_heads + head;
    int arrived;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0,[%1],1;" : "=r"(arrived) : "l"(counter) : "memory");
    *flag = arrived == item.parts - 1;
    if (*flag) *counter = 0;  // for the next launch
  }
  __syncthreads();
  if (!*flag) return;
  for (int column = warp; column < columns; column += 4) {
    Column<D> result;
    result.init();
    const int64_t at = first + column;
    constexpr int batch = 8;  // parts whose loads are under way together
    for (int part = 0; part < item.parts; part += batch) {
      float values[batch][D / 32];
      float2 ms[batch];
#pragma unroll
      for (int j = 0; j < batch; j++) {
        const bool any = part + j < item.parts;
        const int64_t from = at + (part + j) * part_stride;
        ms[j] = any ? __ldcg(reinterpret_cast<const float2*>(p.partial_max_sum) + from) : make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int i = 0; i < D / 32; i++) values[j][i] = any ? __ldcg(p.partial_out + from * D + 32 * i + lane) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < batch; j++) result.add(ms[j].x, ms[j].y, [&](int i) { return values[j][i]; });
    }
    write_column<D>(p, item, head, column, result);
  }
}

}  // namespace kvarn
