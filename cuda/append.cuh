// Appends the rows of a step to one layer: tiles are sealed, other rows are rotated and written to their slots.
//
// One launch: blocks 0 … 2·seals·kv_heads - 1 seal (K and V of a head next to each other), the following ones write rows.
// No block waits for another: a seal rotates the rows that it needs itself. Seals come first since they take longest.
// A seal whose page is negative is skipped, so that a captured graph may hold more seals than a step has.
// Threads: append_threads<D, G>; rows: vector_lanes<D> lanes × 8 channels per head vector.
// Cost: rows move 4·D bytes per vector; for seals see seal.cuh.
#pragma once
#include "predecessor.cuh"
#include "seal.cuh"

namespace kvarn {

// Writes one K or V head vector per vector_lanes<D> lanes to its slot.
template <int D, int G>
__device__ __forceinline__ void append_rows(const AppendParams& p, int block) {
  constexpr int lanes = vector_lanes<D>, vectors = append_threads<D, G> / lanes;
  const int heads = p.cache.kv_heads, channel = threadIdx.x % lanes * 8;
  const int64_t vector = int64_t(block) * vectors + threadIdx.x / lanes;
  const int side = int(vector % 2), head = int(vector / 2 % heads);
  const int64_t row = vector / 2 / heads;
  const int place = row < p.rows ? p.slot_of_row[row] : -1;
  uint4 raw{0, 0, 0, 0};
  if (place >= 0 && channel < D) raw = load_raw(side ? p.v : p.k, row, head, channel);
  Counts counts;
  float x[8];
  to_floats(raw, p.dtype, x);
  make_finite(x, counts);
  if (!p.rotated) rotate<D>(x);
  const uint4 rounded = round_halves(x, counts);
  if (place >= 0 && channel < D) {
    uint16_t* slot = p.cache.slots + ((int64_t(place / G) * heads + head) * 2 + side) * (G * D);
    *reinterpret_cast<uint4*>(slot + place % G * D + channel) = rounded;
  }
  add_counts(p.counts, counts);
}

template <int D, int G>
__device__ __forceinline__ void append(const AppendParams& p) {
  extern __shared__ __align__(16) char memory[];
  let_successor_begin();
  wait_for_predecessor();
  const int seal_blocks = 2 * p.seals_count * p.cache.kv_heads;
  if (block_index() >= seal_blocks) {
    append_rows<D, G>(p, block_index() - seal_blocks);
    return;
  }
  const SealBlock block = seal_block(p);
  if (p.seals[block.seal].page < 0) return;
  using Key = Shape<Side::Key, D, G>;
  using Value = Shape<Side::Value, D, G>;
  if (!block.value) {
    if (thread_index() < Key::threads) seal_tile<Key>(p, memory);
  } else {
    if (thread_index() < Value::threads) seal_tile<Value>(p, memory);
  }
}

}  // namespace kvarn

// Registers per thread: 64 and 32 warps per multiprocessor; blocks of at most 256 threads hold matrices of 64 columns, whose 16
// rows per warp need more: up to 128, and 16 warps.
#define KVARN_APPEND(D, G)                                                                                              \
  extern "C" __global__ void __launch_bounds__((kvarn::append_threads<D, G>),                                           \
                                               (kvarn::append_threads<D, G> > 256 ? 1024 : 512) / kvarn::append_threads<D, G>) \
      kvarn_append_d##D##_g##G(const __grid_constant__ kvarn::AppendParams p) {                                         \
    kvarn::append<D, G>(p);                                                                                             \
  }
