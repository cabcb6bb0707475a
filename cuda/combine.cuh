// From the partial results of warps and thread blocks to the output.
//
// A partial result is (base, sum, out): out / sum is attention over some of the keys, base what logits were measured from,
// in base 2. Merges happen in a fixed order: the warps of a block, then the parts of a query block, done by the thread block
// that arrives last. Of many parts, groups of neighbours are merged first, each by the block that arrives last of its own:
// one block would read them for longer than the others worked on them. How a sequence is cut into parts depends on its own
// length only, so a result does not depend on the batch.
//
// Columns lie in a warp as rotate.cuh lays out head vectors: eight channels a lane, several columns side by side.
#pragma once
#include "query.cuh"

namespace kvarn {

// This lane's channels of one query column.
struct Column {
  float out[8];
  float base, sum;

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = 0;
    base = -INFINITY, sum = 0;
  }
};

// Base of a partial result for the maximum over several; nothing summed counts for nothing.
__device__ __forceinline__ float base_of(float2 base_sum) { return base_sum.y != 0.0f ? base_sum.x : -INFINITY; }

// Weight of a partial result against a common base.
__device__ __forceinline__ float weight(float2 base_sum, float common_base) {
  return base_sum.y != 0.0f ? exp2_approx(base_sum.x - common_base) : 0.0f;
}

// Adds partial results to `column`.
template <int Count>
__device__ __forceinline__ void merge(Column& column, const float2 (&base_sum)[Count], const float (&out)[Count][8]) {
  float m = base_of(make_float2(column.base, column.sum));
#pragma unroll
  for (int j = 0; j < Count; j++) m = fmaxf(m, base_of(base_sum[j]));
  const float ours = weight(make_float2(column.base, column.sum), m);
  column.base = m, column.sum *= ours;
#pragma unroll
  for (int i = 0; i < 8; i++) column.out[i] *= ours;
#pragma unroll
  for (int j = 0; j < Count; j++) {
    const float theirs = weight(base_sum[j], m);
    column.sum = fmaf(base_sum[j].y, theirs, column.sum);
#pragma unroll
    for (int i = 0; i < 8; i++) column.out[i] = fmaf(out[j][i], theirs, column.out[i]);
  }
}

__device__ __forceinline__ void load8(float (&x)[8], const float* at) {
  const float4 low = *reinterpret_cast<const float4*>(at), high = *reinterpret_cast<const float4*>(at + 4);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// Past the first-level cache, which does not see what other thread blocks write.
__device__ __forceinline__ void load8_global(float (&x)[8], const float* at) {
  const float4 low = __ldcg(reinterpret_cast<const float4*>(at)), high = __ldcg(reinterpret_cast<const float4*>(at + 4));
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void store8(float* at, const float (&x)[8]) {
  *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(at + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// Where a warp leaves its partial results: [column][row], (base, sum) behind the channels of each column.
template <int D, int NT>
struct WarpResults {
  static constexpr int row = D + 4;  // keeps the lanes of a fragment apart in the banks
  static constexpr int bytes = 8 * NT * row * 4;
};

// Merges the results of one column that the first `count` warps left; those of warp w lie at `results` + w `stride` bytes.
template <int D, int NT, int Warps>
__device__ __forceinline__ Column merge_warps(const unsigned char* results, int stride, int count, int column,
                                              int channel) {
  float2 base_sum[Warps];
  float values[Warps][8];
#pragma unroll
  for (int w = 0; w < Warps; w++) {
    // Those of the first once more, with the weight of nothing.
    const bool any = w < count;
    const float* row =
        reinterpret_cast<const float*>(results + (any ? w : 0) * stride) + column * WarpResults<D, NT>::row;
    base_sum[w] = *reinterpret_cast<const float2*>(row + D);
    if (!any) base_sum[w].y = 0.0f;
    load8(values[w], row + channel);
  }
  Column merged;
  merged.init();
  merge(merged, base_sum, values);
  return merged;
}

// Writes a column's output: attention-sink logit, division, rotation back, conversion, log-sum-exp. Every lane of the warp
// calls; those with `any` write.
template <int D>
__device__ __forceinline__ void write_column(const AttendParams& p, const Item& item, int head, int column, bool any,
                                             Column& result) {
  const Vectors<D> at;
  const int row = item.query_row + column / p.group, query_head = head * p.group + column % p.group;
  if (p.sink_logits && any) {
    const float logit = p.sink_logits[query_head] * kLog2E;
    if (logit > -INFINITY) {
      const float2 base_sum[1] = {make_float2(logit, 1.0f)};
      const float nothing[1][8] = {};
      merge(result, base_sum, nothing);
    }
  }
  if (p.lse && any && at.channel == 0)
    p.lse[int64_t(row) * p.cache.kv_heads * p.group + query_head] =
        result.sum != 0.0f ? (result.base + log2f(result.sum)) / kLog2E : -INFINITY;
  const float factor = result.sum != 0.0f ? 1.0f / result.sum : 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) result.out[i] = at.holds() ? result.out[i] * factor : 0.0f;
  if (!p.rotated) rotate<D>(result.out);
  if (any && at.holds()) store_elements(element(p.out, row, query_head, at.channel), p.dtype, result.out);
}

// Where the parts of (query block, head) begin in the workspace, in columns, and how far apart they are.
struct Parts {
  int64_t first, stride;
  __device__ __forceinline__ Parts(const AttendParams& p, const Item& item, int head)
      : first((int64_t(item.first_part) * p.cache.kv_heads + head) * p.columns),
        stride(int64_t(p.cache.kv_heads) * p.columns) {}
};

// Leaves this lane's channels of a column of the workspace.
template <int D>
__device__ __forceinline__ void store_part(const AttendParams& p, int64_t to, int channel, const Column& result) {
  store8(p.partial_out + to * D + channel, result.out);
  if (channel == 0) reinterpret_cast<float2*>(p.partial_base_sum)[to] = make_float2(result.base, result.sum);
}

// Merges the results of the block's warps and hands them on: to the output if they are all there is, else to the workspace.
// All threads call, after a barrier.
template <int D, int NT, int Warps>
__device__ __forceinline__ void hand_on(const AttendParams& p, const Item& item, int head, const unsigned char* results,
                                        int stride) {
  const Vectors<D> at;
  const int columns = item.query_tokens * p.group;
  for (int first = threadIdx.x / 32 * at.per_warp; first < columns; first += Warps * at.per_warp) {
    const int column = first + at.vector;
    const bool any = column < columns && at.holds();
    Column result;
    result.init();
    if (any) result = merge_warps<D, NT, Warps>(results, stride, Warps, column, at.channel);
    if (item.parts == 1) {
      write_column<D>(p, item, head, column, column < columns, result);
    } else if (any) {
      const Parts parts(p, item, head);
      store_part<D>(p, parts.first + item.part * parts.stride + column, at.channel, result);
    }
  }
}

// Which parts of a query block are merged: first, first + step …
struct Merged {
  int first, count, step;
};

// Merges parts: to the output, or to where the first of them lay. Loads of many parts are under way together: this is
// latency and nothing else. All threads call; `results` is free and is not read afterwards.
template <int D, int NT, int Warps>
__device__ __forceinline__ void merge_parts(const AttendParams& p, const Item& item, int head, Merged of, bool to_output,
                                            unsigned char* results, int stride) {
  constexpr int batch = 8;
  const Vectors<D> at;
  const Parts parts(p, item, head);
  const int64_t begin = parts.first + of.first * parts.stride, step = of.step * parts.stride;
  const int warp = threadIdx.x / 32, columns = item.query_tokens * p.group;
  // Warps that share a column's parts: warp w of them has parts w, w + split …
  const int split = min(of.count > 2 * batch ? 4 : of.count > batch ? 2 : 1, Warps);
  for (int first = warp / split * at.per_warp; first < columns; first += Warps / split * at.per_warp) {
    const int column = first + at.vector;
    if (column >= columns || !at.holds()) continue;
    const float2* base_sum = reinterpret_cast<const float2*>(p.partial_base_sum) + begin + column;
    const float* out = p.partial_out + (begin + column) * D + at.channel;
    Column merged;
    merged.init();
#pragma unroll 1
    for (int part = warp % split; part < of.count; part += split * batch) {
      float values[batch][8];
      float2 from[batch];
#pragma unroll
      for (int j = 0; j < batch; j++) {
        const int64_t row = (part + j * split) * step;
        from[j] = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 8; i++) values[j][i] = 0;
        if (part + j * split < of.count) {
          from[j] = __ldcg(base_sum + row);
          load8_global(values[j], out + row * D);
        }
      }
      merge(merged, from, values);
    }
    float* row = reinterpret_cast<float*>(results + warp % split * stride) + column * WarpResults<D, NT>::row;
    store8(row + at.channel, merged.out);
    if (at.channel == 0) *reinterpret_cast<float2*>(row + D) = make_float2(merged.base, merged.sum);
  }
  __syncthreads();
  for (int first = warp * at.per_warp; first < columns; first += Warps * at.per_warp) {
    const int column = first + at.vector;
    const bool any = column < columns && at.holds();
    Column result;
    result.init();
    if (any) result = merge_warps<D, NT, Warps>(results, stride, split, column, at.channel);
    if (to_output)
      write_column<D>(p, item, head, column, column < columns, result);
    else if (any)
      store_part<D>(p, begin + column, at.channel, result);
  }
}

// Whether this block's `done` parts are the last of all `parts`: then everything that any block wrote of them is visible
// to it. All threads call, after a barrier behind their writes and behind what they read of `flag`; a barrier comes last
// within.
__device__ __forceinline__ bool last_to_arrive(int32_t* counter, int done, int parts, int* flag) {
  if (threadIdx.x == 0) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0,[%1],%2;" : "=r"(before) : "l"(counter), "r"(done) : "memory");
    *flag = before + done == parts;
    if (*flag) *counter = 0;  // for the next launch
  }
  __syncthreads();
  return *flag;
}

// Up to so many parts are merged at once, more of them in groups.
constexpr int kMergedAtOnce = 32, kMergedGroup = 16;

// Counts the `done` parts that end with the item's as there, and merges what is complete. All threads call, after a
// barrier behind their writes; `results` is free and is not read afterwards.
template <int D, int NT, int Warps>
__device__ __forceinline__ void arrive(const AttendParams& p, const Item& item, int head, int done, int* flag,
                                       unsigned char* results, int stride) {
  // One for each part: that of a group's first counts the group, that of part 1 the groups.
  int32_t* counters = p.counters + int64_t(item.first_part) * p.cache.kv_heads + head;
  int merged = done, count = item.parts, step = 1;
  if (item.parts > kMergedAtOnce) {
    merged = 0, count = (item.parts + kMergedGroup - 1) / kMergedGroup, step = kMergedGroup;
#pragma unroll 1
    for (int first = (item.part + 1 - done) / kMergedGroup * kMergedGroup; first <= item.part; first += kMergedGroup) {
      const int begin = max(first, item.part + 1 - done), end = min(first + kMergedGroup, item.part + 1);
      const int size = min(kMergedGroup, item.parts - first);
      if (last_to_arrive(counters + first * p.cache.kv_heads, end - begin, size, flag)) {
        merge_parts<D, NT, Warps>(p, item, head, {first, size, 1}, false, results, stride);
        merged++;
      }
      __syncthreads();
    }
  }
  if (merged > 0 && last_to_arrive(counters + p.cache.kv_heads, merged, count, flag))
    merge_parts<D, NT, Warps>(p, item, head, {0, count, step}, true, results, stride);
}

}  // namespace kvarn
