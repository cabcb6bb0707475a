// Seals one side (K or V) of one tile: rotated halves in, packed record bytes out. One thread block.
//
// Steps: stage the tile in shared memory as halves; prescale; normalise; round; refit rows; guard; unbiased token scales;
// guard; pack (the formulas are in the headers of each step). Source: KVarN, arXiv 2606.03458, Algorithm 1; refit is ours.
// Data: the matrix lives in registers as float32 (shape.cuh), becomes the balanced matrix, then its codes; the halves stay
// staged for the token scales. Row parameters live in the lanes that own the rows, column parameters in the column's owners.
// Numerics: as the CPU encoder, within the format's contract for ties; sums in another order. Same input, same bytes.
// Cost: reads 2·G·D bytes, writes the record; bound by instruction issue: about 130 operations per element with refit.
#pragma once
#include "guard.cuh"
#include "normalize.cuh"
#include "pack.cuh"
#include "refit.cuh"
#include "stage.cuh"

namespace kvarn {

// Where one side lies in a record; widths are known at run time only, so that one kernel serves them all.
struct SidePlace {
  int codes, code_bytes, parameters, end;  // `end`: of what this side writes; V fills up the record
  int row_scale, row_zero, column_scale;   // from `parameters`
};

template <class S>
__device__ __forceinline__ SidePlace side_place(int key_bits, int value_bits) {
  constexpr int D = S::D, G = S::G;
  const int key_codes = D * G * key_bits / 8, key_end = key_codes + 4 * D + 2 * G;
  if (S::side == Side::Key) return {0, key_codes, key_codes, key_end, 0, 2 * D, 4 * D};
  const int value_codes = D * G * value_bits / 8, parameters = key_end + value_codes;
  return {key_end, value_codes, parameters, (parameters + 2 * D + 4 * G + 127) / 128 * 128, 2 * D, 2 * D + 2 * G, 0};
}

// b = v / column scale / row scale, divided in this order. Lanes own row scales, shared memory has the columns'.
template <class S>
__device__ __forceinline__ void balance(float (&v)[S::rows][S::columns], float row_scale, const float* column_scale, float4* rows) {
  share_rows<S>(rows, 0.0f, row_scale, 0.0f);
#pragma unroll
  for (int j = 0; j < S::columns; ++j) {
    const float scale = column_scale[32 * j + thread_index() % 32], reciprocal = reciprocal_of(scale);
#pragma unroll
    for (int i = 0; i < S::rows; ++i) v[i][j] = divide(v[i][j], scale, reciprocal);
  }
#pragma unroll
  for (int i = 0; i < S::rows; ++i) {
    const float4 row = rows[i];
#pragma unroll
    for (int j = 0; j < S::columns; ++j) v[i][j] = divide(v[i][j], row.y, row.z);
  }
}

// K: unbiased token scales are column scales. The rows are halves from here on; the scale makes up for what that costs.
template <class S>
__device__ __forceinline__ void unbiased_columns(const float (&code)[S::rows][S::columns], Parameters& of, float4* rows, char* memory) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  auto* partial = reinterpret_cast<float*>(memory + SealMemory<S>::partial);
  of.row_scale = through_half(of.row_scale);
  of.row_zero = through_half(of.row_zero);
  share_rows<S>(rows, of.row_zero, of.row_scale, 0.0f);
#pragma unroll
  for (int j = 0; j < S::columns; ++j) {
    const int column = 32 * j + lane;
    const auto* token = reinterpret_cast<const __half*>(memory) + column * SealMemory<S>::token_halves;
    Sum3 sum{0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < S::rows; ++i) {
      const float m = __half2float(token[S::row(warp, i)]), base = fmaf(code[i][j], rows[i].y, rows[i].x);
      sum = {fmaf(m, m, sum.a), fmaf(base, m, sum.b), fmaf(base, base, sum.c)};
    }
    const int at = warp * (S::C + 1) + column;
    partial[at] = sum.a;
    partial[at + SealMemory<S>::plane] = sum.b;
    partial[at + 2 * SealMemory<S>::plane] = sum.c;
  }
  __syncthreads();
  const int owner = thread_index();
  if (owner >= S::C * S::owners) return;
  Sum3 sum{0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < S::partials; ++i) {
    const int at = (owner % S::owners * S::partials + i) * (S::C + 1) + owner / S::owners;
    sum = Add()(sum, {partial[at], partial[at + SealMemory<S>::plane], partial[at + 2 * SealMemory<S>::plane]}, 1.0f);
  }
  of.column_scale = token_scale(reduce_lanes(sum, S::owners, Add()), of.column_scale);
}

// V: unbiased token scales multiply the row parameters while these are unrounded, so that they are rounded once.
template <class S>
__device__ __forceinline__ void unbiased_rows(const float (&code)[S::rows][S::columns], Parameters& of, float4* rows, char* memory) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  auto* column_scale = reinterpret_cast<float*>(memory + SealMemory<S>::column);
  const auto* tile = reinterpret_cast<const __half*>(memory);
  of.column_scale = through_half(of.column_scale);
  if (thread < S::C * S::owners && thread % S::owners == 0) column_scale[thread / S::owners] = of.column_scale;
  share_rows<S>(rows, through_half(of.row_zero), through_half(of.row_scale), 0.0f);
  __syncthreads();
  const auto products = [&](int i) {
    const float4 row = rows[i];
    Sum3 sum{0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < S::columns; ++j) {
      const float m = __half2float(tile[S::row(warp, i) * SealMemory<S>::token_halves + 32 * j + lane]);
      const float value = fmaf(code[i][j], row.y, row.x) * column_scale[32 * j + lane];
      sum = {fmaf(m, m, sum.a), fmaf(value, m, sum.b), fmaf(value, value, sum.c)};
    }
    return sum;
  };
  const float factor = token_scale(reduce_rows<S::rows>(products, Add()), 1.0f);
  of.row_scale *= factor;
  of.row_zero *= factor;
}

// Parameters as halves, in the record's orders.
template <class S>
__device__ __forceinline__ void write_parameters(const Parameters& of, const SidePlace& place, char* staged, Counts& counts) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  if (lane % S::copies == 0) {
    const int at = k_order(S::row(warp, lane / S::copies), S::R);
    *reinterpret_cast<__half*>(staged + place.row_scale + at) = round_half(of.row_scale, counts);
    *reinterpret_cast<__half*>(staged + place.row_zero + at) = round_half(of.row_zero, counts);
  }
  if (thread < S::C * S::owners && thread % S::owners == 0) {
    const int at = row_order(thread / S::owners, S::C);
    *reinterpret_cast<__half*>(staged + place.column_scale + at) = round_half(of.column_scale, counts);
  }
}

// What a block seals: K and V of a head lie next to each other.
struct SealBlock {
  int seal, head;
  bool value;
};

__device__ __forceinline__ SealBlock seal_block(const AppendParams& p) {
  const int block = block_index(), tile = block / 2;
  return {tile / p.cache.kv_heads, tile % p.cache.kv_heads, block % 2 == 1};
}

template <class S>
__device__ __forceinline__ void seal_tile(const AppendParams& p, char* memory) {
  using At = SealMemory<S>;
  // Registers are scarce: what is needed again much later is left in shared memory.
  const int bits = S::side == Side::Key ? p.key_bits : p.value_bits;
  const float max_code = float((1 << bits) - 1);
  auto* rows = reinterpret_cast<float4*>(memory + At::row) + thread_index() / 32 * S::rows;
  auto* row_scale = reinterpret_cast<float*>(memory + At::row_scale);
  auto* column_scale = reinterpret_cast<float*>(memory + At::column);
  auto* guards = reinterpret_cast<float*>(memory + At::guard);

  {
    const SealBlock block = seal_block(p);
    stage_tile<S>(p, p.seals[block.seal], block.head, memory);
  }
  __syncthreads();
  float v[S::rows][S::columns];
  load_staged<S>(memory, v);
  auto& exponent = *reinterpret_cast<int*>(memory + At::prescale);
  if (p.refit) {
    const int found = prescale_exponent<S>(v, memory);
    if (thread_index() == 0) exponent = found;
    const float down = power_of_two(-found);
#pragma unroll
    for (int i = 0; i < S::rows; ++i) {
#pragma unroll
      for (int j = 0; j < S::columns; ++j) v[i][j] *= down;
    }
  }

  normalize<S>(v, p.iterations, memory);
  balance<S>(v, row_scale[thread_index() / S::copies], column_scale, rows);
  RowMap map = row_range<S>(v, max_code);
  if (p.refit) map = refit_rows<S>(v, rows, map, max_code);
  to_codes<S>(v, rows, map, max_code);

  const float prescale = p.refit ? power_of_two(exponent) : 1.0f;
  const int thread = thread_index();
  const float own_scale = row_scale[thread / S::copies];
  const float4 own = rows[thread % 32 / S::copies];  // {zero, scale, …}, as to_codes shared them
  Parameters of{own_scale * (own.y * prescale), own_scale * (own.x * prescale),
                thread < S::C * S::owners ? column_scale[thread / S::owners] : 0.0f};
  guard<S>(of, guards);
  if (p.refit) {
    if constexpr (S::side == Side::Key) {
      unbiased_columns<S>(v, of, rows, memory);
    } else {
      unbiased_rows<S>(v, of, rows, memory);
    }
    guard<S>(of, guards + 64);
  }

  // Nobody reads the staged tile or the column sums after the last guard's barrier.
  const SidePlace place = side_place<S>(p.key_bits, p.value_bits);
  auto* words = reinterpret_cast<uint32_t*>(memory + At::tile);
  Counts counts;
  write_parameters<S>(of, place, memory + At::partial, counts);
  add_counts(p.counts, counts);
  write_words<S>(v, bits, words);
  __syncthreads();
  const SidePlace value = side_place<Shape<Side::Value, S::D, S::G>>(p.key_bits, p.value_bits);
  const SealBlock block = seal_block(p);
  uint8_t* record = p.cache.pages + (int64_t(p.seals[block.seal].page) * p.cache.kv_heads + block.head) * value.end;
  store_words<S>(words, bits, record + place.codes);
  constexpr int parameter_bytes = 4 * S::R + 2 * S::C;
  for (int byte = 16 * thread_index(); byte < place.end - place.parameters; byte += 16 * S::threads) {
    *reinterpret_cast<uint4*>(record + place.parameters + byte) =
        byte < parameter_bytes ? *reinterpret_cast<const uint4*>(memory + At::partial + byte) : uint4{0, 0, 0, 0};
  }
}

}  // namespace kvarn
