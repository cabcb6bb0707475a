// Attention over records and slots: rotation of queries and outputs, sinks and tail, all in one launch per layer.
//
// Thread blocks of four warps (two or one where records are so large that four do not fit), one for each share of the work,
// which it does piece by piece (crates/kvarn-cuda/src/{plan,share}.rs). A piece is a run of record tiles of one sequence, or
// one slot, for a block of up to 8 NT query columns and one KV head. In a record item the warps take turns at the tiles: K
// and V of a warp's next tile are under way while it works (fetch.cuh), one buffer each, across the border of pieces too.
// In a slot item they take turns at its quarters.
//
// Descriptions of pieces come two pieces ahead. Queries are rotated and laid out once per query block and head, which a
// share meets one after the other. Between pieces the warps' results are merged in the V buffers, which are free then: K
// of the next piece is on its way.
//
// Bound by: bytes of the records, read once from global memory; about 55 KB under way per block at D 128, k4v2.
#pragma once
#include "combine.cuh"
#include "fetch.cuh"
#include "predecessor.cuh"
#include "record_tile.cuh"
#include "slot_tile.cuh"

namespace kvarn {

constexpr int kItemWords = sizeof(Item) / 4, kShareWords = sizeof(Share) / 4;

// Bytes of shared memory that a block can have.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kMostShared = 227 * 1024;
#elif __CUDA_ARCH__ == 800
constexpr int kMostShared = 163 * 1024;
#else
constexpr int kMostShared = 99 * 1024;
#endif

// Shared memory of a block. It has four warps, or as many as there is room for: the host asks the kernel.
template <class L, int NT>
struct AttendMemory {
  static constexpr int keys = L::key_end, value_bytes = L::value_end - L::value_codes;
  static constexpr int results = WarpResults<L::D, NT>::bytes;
  static constexpr int values = value_bytes > results ? value_bytes : results;
  static constexpr int barriers = keys + values, buffers = barriers + 16;  // of one warp
  static constexpr int ahead = 4;  // descriptions: of the piece at work, of two behind it, and of the last one
  static constexpr int query_bytes = NT * (L::D / 16) * 512, work_bytes = (ahead * int(sizeof(Share)) + 15) / 16 * 16;
  static constexpr int rest = (query_bytes + work_bytes + 4 * (8 * NT + 2) + 15) / 16 * 16;
  static constexpr int warps = 4 * buffers + rest <= kMostShared ? 4 : 2 * buffers + rest <= kMostShared ? 2 : 1;
  static constexpr int fragments = warps * buffers, works = fragments + query_bytes, largest = works + work_bytes;
  static constexpr int flag = largest + 4 * (8 * NT + 1);
  static constexpr int bytes = fragments + rest;
  static_assert(bytes <= kMostShared, "one warp fits");

  // Blocks per multiprocessor that the register budget is set for: no more than there is memory for, which is 1 KB more
  // than a block can have, as each takes 1 KB more than it asks for.
  static constexpr int by_memory = (kMostShared + 1024) / (bytes + 1024);
  static constexpr int by_registers = NT == 1 && (L::D == 64 || L::D == 128) ? 3 : 2;
  static constexpr int blocks = by_memory < by_registers ? by_memory : by_registers;
};

// The piece behind a piece of the same share in the order of all work, to `index` and `head`.
__device__ __forceinline__ void following(const Share& work, int kv_heads, int& index, int& head) {
  const bool same = work.first.part + 1 < work.first.parts, next_head = !same && work.head + 1 < kv_heads;
  index = next_head ? work.item - work.first.part : work.item + 1;
  head = same ? work.head : next_head ? work.head + 1 : 0;
}

// A warp's way through a share.
template <class L, int NT>
struct Reader {
  using M = AttendMemory<L, NT>;
  const AttendParams& p;
  unsigned char* memory;
  int lane, warp;
  uint32_t phase = 0;  // of this warp's barriers: K and V alternate

  __device__ __forceinline__ Reader(const AttendParams& params, unsigned char* shared)
      : p(params), memory(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    if (lane == 0) fetch_init(barrier(0)), fetch_init(barrier(1));
  }

  __device__ __forceinline__ unsigned char* keys() const { return memory + warp * M::buffers; }
  __device__ __forceinline__ unsigned char* values() const { return keys() + M::keys; }
  __device__ __forceinline__ uint32_t barrier(int which) const {
    return shared_address(keys()) + M::barriers + 8 * which;
  }
  // Piece `i` of this block, as the share that begins with it.
  __device__ __forceinline__ Share& work(int i) const { return reinterpret_cast<Share*>(memory + M::works)[i % M::ahead]; }
  __device__ __forceinline__ const uint4* queries() const { return reinterpret_cast<const uint4*>(memory + M::fragments); }

  // Index among the layer's records of this warp's record `j` of piece `i`; -1 where there is none.
  __device__ __forceinline__ int record(int i, int j) const {
    const Share& at = work(i);
    const int tile = warp + M::warps * j;
    return tile < at.first.tiles ? at.first.pages[tile] * p.cache.kv_heads + at.head : -1;
  }
  __device__ __forceinline__ void issue_keys(int record) const {
    fetch_issue<M::keys>(shared_address(keys()), barrier(0), p.cache.pages + int64_t(record) * L::record_bytes, record >= 0,
                         lane);
  }
  __device__ __forceinline__ void issue_values(int record) const {
    fetch_issue<M::value_bytes>(shared_address(values()), barrier(1),
                                p.cache.pages + int64_t(record) * L::record_bytes + L::value_codes, record >= 0, lane);
  }
};

// The record tiles of piece `i`. Leaves K of the next piece's first tile under way, and V not.
template <class L, int NT>
__device__ __forceinline__ void attend_records(Reader<L, NT>& reader, int i, float query_unit, Softmax<NT>& softmax,
                                               float (&O)[NT][L::D / 16][4]) {
  using M = AttendMemory<L, NT>;
  const AttendParams& p = reader.p;
  const Item& item = reader.work(i).first;
  const float cap = p.softcap * kLog2E;
  const int tiles = (item.tiles - reader.warp + M::warps - 1) / M::warps;
  const int first_of_next = reader.record(i + 1, 0);
  if (tiles == 0) reader.issue_keys(first_of_next);
  // Positions between these are seen by every column.
  const int low = max(visible(item.position, item.query_tokens - 1, p.window, item.stored).low,
                      item.first_tile == 0 ? p.sink_tokens : 0);
  const int high = visible(item.position, 0, p.window, item.stored).high;
  const bool whole = item.first_tile * L::G >= low && (item.first_tile + item.tiles) * L::G <= high;
#pragma unroll 1
  for (int j = 0; j < tiles; j++) {
    const int next = j + 1 < tiles ? reader.record(i, j + 1) : first_of_next;  // early: the load takes its time
    float S[NT][L::G / 16][4];
    fetch_wait(reader.barrier(0), reader.phase);
    record_logits<L, NT>(reader.keys(), reader.queries(), softmax,
                         query_unit * power_of_two(-kSubnormal), cap, S, reader.lane);
    reader.issue_keys(next);
    if (!whole) {
      const int tile = item.first_tile + reader.warp + M::warps * j;
      mask(S, tile * L::G, p.group, item.position, p.window, item.stored, tile == 0 ? p.sink_tokens : 0, reader.lane);
    }
    fetch_wait(reader.barrier(1), reader.phase);
    reader.phase ^= 1;
    record_values<L, NT>(reader.values(), softmax, S, O, reader.lane);
    if (j + 1 < tiles) reader.issue_values(next);
  }
}

// The slot of piece `i`. Leaves K of the next piece's first tile under way, and V not.
template <class L, int NT>
__device__ __forceinline__ void attend_slot(Reader<L, NT>& reader, int i, float query_unit, Softmax<NT>& softmax,
                                            float (&O)[NT][L::D / 16][4]) {
  using M = AttendMemory<L, NT>;
  const AttendParams& p = reader.p;
  const Share& work = reader.work(i);
  const Item& item = work.first;
  reader.issue_keys(reader.record(i + 1, 0));
  const uint16_t* keys = p.cache.slots + (int64_t(item.slot) * p.cache.kv_heads + work.head) * 2 * L::G * L::D;
  const int position = item.first_tile * L::G;
  constexpr int tokens = 16 * slot_slices<L>;
#pragma unroll 1
  for (int first = reader.warp * tokens; first < item.slot_tokens; first += M::warps * tokens) {
    float S[NT][slot_slices<L>][4];
    slot_logits<L, NT>(keys, first, item.slot_tokens, reader.queries(), softmax, query_unit,
                       p.softcap * kLog2E, S, reader.lane);
    mask(S, position + first, p.group, item.position, p.window, min(item.stored, position + item.slot_tokens), 0,
         reader.lane);
    slot_values<L, NT>(keys + L::G * L::D, first, item.slot_tokens, softmax, S, O, reader.lane);
  }
}

// Leaves a warp's results in its V buffer.
template <class L, int NT, bool Records>
__device__ __forceinline__ void leave_results(const Reader<L, NT>& reader, const Softmax<NT>& softmax,
                                              const float (&O)[NT][L::D / 16][4]) {
  const int lane = reader.lane, g = lane / 4, c = lane % 4;
  constexpr int row = WarpResults<L::D, NT>::row;
  float* out = reinterpret_cast<float*>(reader.values()) + 2 * c * row;
  __syncwarp();  // V has been read by every lane
#pragma unroll
  for (int b = 0; b < NT; b++) {
#pragma unroll
    for (int d = 0; d < L::D / 16; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int channel = Records ? 16 * d + g + 8 * (i / 2) : slot_output_channel(d, i / 2, g);
        const float unit = Records ? record_output_unit<L>(d, i / 2) : 1.0f;
        out[(8 * b + i % 2) * row + channel] = O[b][d][i] * unit;
      }
    if (g == 0)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *reinterpret_cast<float2*>(out + (8 * b + i) * row + L::D) = make_float2(softmax.base[b][i], softmax.sum[b][i]);
  }
  fetch_after_writes();
}

template <class L, int NT>
__device__ __forceinline__ void attend(const AttendParams& p) {
  using M = AttendMemory<L, NT>;
  extern __shared__ __align__(128) unsigned char memory[];
  const Share* mine = p.shares + blockIdx.x;
  Reader<L, NT> reader(p, memory);
  const auto copy = [&](void* to, const void* from, int words) {
#pragma unroll
    for (int first = 0; first < kShareWords; first += 32 * M::warps) {
      int word;  // asked for anew: what is kept across tiles has no register
      asm volatile("mov.u32 %0,%%tid.x;" : "=r"(word));
      word += first;
      if (word < words) fetch_word(static_cast<int32_t*>(to) + word, static_cast<const int32_t*>(from) + word);
    }
  };
  // Describes the piece behind piece `i`, which is described and seen by all.
  const auto describe_next = [&](int i) {
    const Share& work = reader.work(i);
    Share& next = reader.work(i + 1);
    if (threadIdx.x >= kShareWords) return;
    if (work.count > 1) {
      int index, head;
      following(work, p.cache.kv_heads, index, head);
      copy(&next.first, p.items + index, kItemWords);
      if (threadIdx.x == 0) next.item = index, next.head = head, next.count = work.count - 1;
    } else if (threadIdx.x == 0) {
      next.count = 0, next.first.tiles = 0;
    }
  };
  copy(&reader.work(0), mine, kShareWords);
  fetch_words_wait();
  __syncthreads();
  wait_for_predecessor();
  if (reader.work(0).count == 0) return;
  describe_next(0);
  reader.issue_keys(reader.record(0, 0));
  reader.issue_values(reader.record(0, 0));

#pragma unroll 1
  for (int i = 0; reader.work(i).count > 0; i++) {
    const Share& work = reader.work(i);
    const Item& item = work.first;
    if (i == 0) fetch_words_wait();
    if (i == 0 || item.part == 0)
      make_fragments<L, NT, M::warps>(p, item, work.head, reinterpret_cast<float*>(memory + M::largest),
                                      reinterpret_cast<uint32_t*>(memory + M::fragments));
    describe_next(i + 1);

    Softmax<NT> softmax;
    softmax.init();
    float O[NT][L::D / 16][4];
#pragma unroll
    for (int b = 0; b < NT; b++)
#pragma unroll
      for (int d = 0; d < L::D / 16; d++)
#pragma unroll
        for (int j = 0; j < 4; j++) O[b][d][j] = 0;
    const float query_unit = reinterpret_cast<const float*>(memory + M::largest)[8 * NT];
    if (item.tiles > 0) {
      attend_records<L, NT>(reader, i, query_unit, softmax, O);
      leave_results<L, NT, true>(reader, softmax, O);
    } else {
      attend_slot<L, NT>(reader, i, query_unit, softmax, O);
      leave_results<L, NT, false>(reader, softmax, O);
    }
    // Blocks that begin while this one reads records would gather on few multiprocessors.
    if (work.count == 1) let_successor_begin();
    fetch_words_wait();
    __syncthreads();

    unsigned char* results = memory + M::keys;
    hand_on<L::D, NT, M::warps>(p, item, work.head, results, M::buffers);
    const bool ends = item.part + 1 == item.parts || work.count == 1;
    const int done = min(i, item.part) + 1;  // of this query block and head by this share
    __syncthreads();  // the results have been read
    if (ends && item.parts > 1) {
      arrive<L::D, NT, M::warps>(p, item, work.head, done, reinterpret_cast<int*>(memory + M::flag), results, M::buffers);
      fetch_after_writes();
      __syncthreads();
    }
    reader.issue_values(reader.record(i + 1, 0));
  }
}

}  // namespace kvarn

// The entry point of one configuration.
#define KVARN_ATTEND(D, G, K, V, NT)                                                                                \
  extern "C" __global__ void __launch_bounds__(32 * kvarn::AttendMemory<kvarn::Layout<D, G, K, V>, NT>::warps,      \
                                               kvarn::AttendMemory<kvarn::Layout<D, G, K, V>, NT>::blocks)          \
      kvarn_attend_d##D##_g##G##_k##K##v##V##_n##NT(const __grid_constant__ kvarn::AttendParams p) {                \
    kvarn::attend<kvarn::Layout<D, G, K, V>, NT>(p);                                                                \
  }
