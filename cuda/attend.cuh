// Attention over records and slots: rotation of queries and outputs, sinks and tail, all in one launch per layer.
//
// Grid (items, kv_heads), four warps. An item is a run of record tiles of one sequence, or one slot, for a block of up to
// 8 NT query columns (plan: crates/kvarn-cuda/src/plan.rs). In a record item each warp takes every fourth tile: K and V of
// its next tile are under way while it works (fetch.cuh), one buffer each. In a slot item each warp takes a quarter.
//
// Bound by: bytes of the records, read once from global memory; about 55 KB under way per block at D 128, k4v2.
#pragma once
#include "combine.cuh"
#include "fetch.cuh"
#include "record_tile.cuh"
#include "slot_tile.cuh"

namespace kvarn {

template <class L, int NT>
struct AttendMemory {
  static constexpr int keys = L::key_end, values = L::value_end - L::value_codes;
  static constexpr int ring = 4 * (keys + values);
  static constexpr int main = (ring > WarpResults<L::D, NT>::bytes ? ring : WarpResults<L::D, NT>::bytes + 15) / 16 * 16;
  static constexpr int barriers = main, flag = barriers + 4 * 2 * 8, fragments = flag + 64;
  static constexpr int rows = fragments + NT * (L::D / 32) * 512;
  static constexpr int bytes = rows + 8 * NT * L::D * 2;
};

template <class L, int NT>
__device__ __forceinline__ void attend_records(const AttendParams& p, const Item& item, int head, unsigned char* memory,
                                               Softmax<NT>& softmax, float (&O)[NT][L::D / 16][4]) {
  using M = AttendMemory<L, NT>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = (item.tiles - warp + 3) / 4;
  const int32_t* table = p.block_table + item.sequence * p.table_stride + item.first_tile + warp;
  const int page = lane < tiles ? table[4 * lane] : 0;
  unsigned char* keys = memory + warp * M::keys;
  unsigned char* values = memory + 4 * M::keys + warp * M::values;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory + M::barriers) + 2 * warp;
  Fetch fetch_keys, fetch_values;
  fetch_keys.init(keys, barriers, lane);
  fetch_values.init(values, barriers + 1, lane);
  const auto record = [&](int j) {
    const int64_t id = __shfl_sync(kFullWarp, page, j % 32);
    return p.cache.pages + (id * p.cache.kv_heads + head) * L::record_bytes;
  };
  fetch_keys.template issue<M::keys>(record(0), tiles > 0, lane);
  fetch_values.template issue<M::values>(record(0) + L::value_codes, tiles > 0, lane);

  __half* rows = reinterpret_cast<__half*>(memory + M::rows);
  uint4* fragments = reinterpret_cast<uint4*>(memory + M::fragments);
  load_queries<L::D, NT, 4>(p, item, head, rows);
  __syncthreads();
  queries_for_records<L::D, NT, L::key_bits>(rows, fragments);
  __syncthreads();

  // Tiles between these bounds are seen whole by every column.
  const int low = max(visible(item.position, item.query_tokens - 1, p.window, item.stored).low, 0);
  const int high = visible(item.position, 0, p.window, item.stored).high;
  const float cap = p.softcap * kLog2E;
#pragma unroll 1
  for (int j = 0; j < tiles; j++) {
    const int tile = item.first_tile + warp + 4 * j, first = tile * L::G;
    const int from = tile == 0 ? p.sink_tokens : 0;
    float S[NT][L::G / 16][4];
    fetch_keys.wait();
    record_logits<L, NT>(keys, fragments, softmax, cap, S, lane);
    fetch_keys.template issue<M::keys>(record(j + 1), j + 1 < tiles, lane);
    if (first < max(low, from) || first + L::G > high)
      mask(S, first, p.group, item.position, p.window, item.stored, from, lane);
    fetch_values.wait();
    record_values<L, NT>(values, softmax, S, O, lane);
    fetch_values.template issue<M::values>(record(j + 1) + L::value_codes, j + 1 < tiles, lane);
  }
}

template <class L, int NT>
__device__ __forceinline__ void attend_slot(const AttendParams& p, const Item& item, int head, unsigned char* memory,
                                            Softmax<NT>& softmax, float (&O)[NT][L::D / 16][4]) {
  using M = AttendMemory<L, NT>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __half* rows = reinterpret_cast<__half*>(memory + M::rows);
  uint4* fragments = reinterpret_cast<uint4*>(memory + M::fragments);
  load_queries<L::D, NT, 4>(p, item, head, rows);
  __syncthreads();
  queries_for_slots<L::D, NT>(rows, fragments);
  __syncthreads();
  const int first = warp * 16 * slot_slices<L>;
  if (first >= item.slot_tokens) return;
  const int64_t slot = p.slot_table[item.sequence * p.table_stride + item.first_tile];
  const uint16_t* keys = p.cache.slots + (slot * p.cache.kv_heads + head) * 2 * L::G * L::D;
  const int position = item.first_tile * L::G;
  float S[NT][slot_slices<L>][4];
  slot_logits<L, NT>(keys, first, fragments, p.softcap * kLog2E, S, lane);
  mask(S, position + first, p.group, item.position, p.window, min(item.stored, position + item.slot_tokens), 0, lane);
  slot_values<L, NT>(keys + L::G * L::D, first, 0, item.slot_tokens, softmax, S, O, lane);
}

template <class L, int NT>
__device__ __forceinline__ void attend(const AttendParams& p) {
  using M = AttendMemory<L, NT>;
  extern __shared__ __align__(128) unsigned char memory[];
  if (int(blockIdx.x) >= *p.item_count) return;
  const Item item = p.items[blockIdx.x];
  const int head = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  Softmax<NT> softmax;
  softmax.init();
  float O[NT][L::D / 16][4];
#pragma unroll
  for (int b = 0; b < NT; b++)
#pragma unroll
    for (int d = 0; d < L::D / 16; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) O[b][d][i] = 0;
  const bool records = item.tiles > 0;
  if (records)
    attend_records<L, NT>(p, item, head, memory, softmax, O);
  else
    attend_slot<L, NT>(p, item, head, memory, softmax, O);

  __syncthreads();  // the buffers are free now
  const WarpResults<L::D, NT> results(memory);
#pragma unroll
  for (int b = 0; b < NT; b++) {
#pragma unroll
    for (int d = 0; d < L::D / 16; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = records ? 16 * d + g + 8 * (i / 2) : slot_output_channel(d, i / 2, g);
        const float unit = records ? record_output_unit<L::value_bits>(d, i / 2) : 1.0f;
        results.out[(warp * 8 * NT + 8 * b + 2 * c + i % 2) * results.row + channel] = O[b][d][i] * unit;
      }
    if (g == 0)
#pragma unroll
      for (int i = 0; i < 2; i++)
        results.max_sum[warp * 8 * NT + 8 * b + 2 * c + i] = make_float2(softmax.base[b][i], softmax.sum[b][i]);
  }
  __syncthreads();
  combine<L::D, NT>(p, item, head, results, reinterpret_cast<int*>(memory + M::flag));
}

}  // namespace kvarn

// Blocks per multiprocessor that the register budget is set for.
#define KVARN_ATTEND_BLOCKS(D, NT) ((NT) == 1 && ((D) == 64 || (D) == 128) ? 3 : 2)

// The entry point of one configuration.
#define KVARN_ATTEND(D, G, K, V, NT)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128, KVARN_ATTEND_BLOCKS(D, NT))                                           \
      kvarn_attend_d##D##_g##G##_k##K##v##V##_n##NT(const __grid_constant__ kvarn::AttendParams p) {                      \
    kvarn::attend<kvarn::Layout<D, G, K, V>, NT>(p);                                                                      \
  }
