// Kernel parameters: one struct per kernel, passed by value, mirrored by `repr(C)` structs in crates/kvarn-cuda.
//
// Pointers are device pointers. Arrays of a step (tables, items, seals) are uploaded once per step and read by every
// layer; pages and slots are those of one layer. Sizes are in elements unless they say bytes; offsets are 64 bit.
#pragma once
#include <stdint.h>

namespace kvarn {

// Element type of a caller's tensor.
enum DType : int32_t { kFloat16 = 0, kBFloat16 = 1 };

// A caller's tensor [rows, heads, head_dim], the last dimension contiguous.
struct Tensor {
  void* data;
  int64_t row_stride;   // elements
  int64_t head_stride;  // elements
};

// Pages [pages][kv_heads][record_bytes] and slots [slots][kv_heads][2][G][D] of one layer.
struct Cache {
  uint8_t* pages;
  uint16_t* slots;
  int32_t kv_heads;
  int32_t unused;
};

// What a step seals: one tile of one sequence. Tokens below `from_row_token` are in the slot, the others come with the
// step's rows, so that sealing never waits for the slot writes of the same launch.
struct Seal {
  int32_t page;
  int32_t slot;            // -1: the whole tile comes with the rows
  int32_t from_row_token;  // first token of the tile that comes with the rows; G: none
  int32_t row;             // row of that token
};

// append: rotates new rows, writes them to slots, seals tiles. One launch per layer.
struct AppendParams {
  Tensor k, v;
  Cache cache;
  const int32_t* slot_of_row;  // [rows]: slot * G + offset, -1: the row is not kept in a slot
  const Seal* seals;           // [seals]
  uint64_t* counts;            // [2]: non-finite and saturated values, added to
  int32_t rows, seals_count, dtype, rotated;
  int32_t refit, iterations;
  int32_t key_bits, value_bits;
};

// Most record tiles of an item.
constexpr int kItemTiles = 32;

// A piece of attention: part of one sequence for one block of its queries, for every KV head.
struct Item {
  int32_t first_tile;  // of the sequence
  int32_t tiles;       // record tiles, at most kItemTiles; 0: a slot item
  int32_t slot;        // of a slot item
  int32_t slot_tokens; // tokens [first_tile * G, + slot_tokens) are read from it
  int32_t part;        // index among the parts that are merged
  int32_t parts;       // their number
  int32_t query_row;   // first row of q of this block of queries
  int32_t query_tokens;// rows of the block
  int32_t position;    // position of the first query
  int32_t stored;      // tokens stored of the sequence
  int32_t first_part;  // where the block's parts begin in the workspace
  int32_t unused;
  int32_t pages[kItemTiles];  // of the record tiles
};

// The run of work of one thread block: `count` pieces from (item, head) on. The order of all work: the items of a query
// block for head 0, then for head 1 …, then those of the next query block.
struct Share {
  int32_t item, head, count, unused;
  Item first;  // a copy of items[item]: the first record is under way one load earlier
};

// attend: one launch per layer.
struct AttendParams {
  Tensor q, out;
  Cache cache;
  const Item* items;           // [items]
  const Share* shares;         // [thread blocks]: on the device, so that a captured graph can follow them
  const float* sink_logits;    // [heads] or null
  float* lse;                  // [rows][heads] or null
  float* partial_out;          // [parts][kv_heads][columns][D]
  float* partial_base_sum;     // [parts][kv_heads][columns][2]
  int32_t* counters;           // [parts][kv_heads], parts that arrived; zero between launches
  int32_t dtype, rotated, group, columns;  // group: query heads per KV head; columns: of the largest query block
  int32_t window;              // INT32_MAX: none
  int32_t sink_tokens;         // positions of tile 0 that are read from its slot even when it has a page
  float scale, softcap;        // softcap 0: none
};

// expand: tokens [first, first + tokens) of one sequence, from records and slots, to dense K and V [tokens, kv_heads, D].
struct ExpandParams {
  Tensor k, v;
  Cache cache;
  const int32_t* block_table;  // [tiles]
  const int32_t* slot_table;   // [tiles]
  int32_t first, tokens, dtype, rotated;
  int32_t sink_tokens, key_bits, value_bits, unused;
};

}  // namespace kvarn
