// Codes held in registers to the record's tensor-core fragment order.
//
// First every warp writes words of whole fragments to shared memory, [fragment][lane]: for 2 to 4 bits one word with a nibble
// per code (the order of 4-bit codes: bits 8u + 4h, + 16 where k is odd), for 8 bits two words. Then any width is a few bit
// operations on whole words, four words = 16 bytes per lane, coalesced.
//   k: index within 16 along the quantised rows, m: along the columns; K: h = k div 8, u = m div 8; V: h = m div 8, u = k div 8.
// A thread holds all k of its words but one m half; lane ^ 8 holds the other: they exchange every second word.
#pragma once
#include "reduce.cuh"
#include "shape.cuh"

namespace kvarn {

// Codes a + 2^shift b, both below 2^shift: exact in float32 as long as the sum is below 2^24.
__device__ __forceinline__ float join(float a, float b, float weight) { return fmaf(b, weight, a); }

// Index of the first of a fragment's lanes, of the thread's rows 4 · four … and column block 2 j + lane div 16.
template <class S>
__device__ __forceinline__ int fragment_of(int thread, int four, int j) {
  const int warp = thread / 32, lane = thread % 32;
  const int row_block = (warp * (S::rows / 4) + four) / 4, column_block = 2 * j + lane / 16;
  return S::side == Side::Key ? column_block * (S::D / 16) + row_block : row_block * (S::D / 16) + column_block;
}

// The lane of the fragment that the thread's codes belong to: 4 (m mod 8) + (k mod 8) div 2.
template <class S>
__device__ __forceinline__ int fragment_lane(int thread, int four) {
  const int warp = thread / 32, lane = thread % 32;
  return 4 * (lane % 8) + (warp * (S::rows / 4) + four) % 4;
}

// Codes to nibble words [fragment][32].
template <class S>
__device__ __forceinline__ void write_nibbles(const float (&code)[S::rows][S::columns], uint32_t* words) {
  constexpr int count = S::rows / 4 * S::columns;
  const int thread = thread_index(), half = thread / 8 % 2;  // m half that the thread holds
#pragma unroll
  for (int pair = 0; pair < count; pair += 2) {
    uint32_t part[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int four = (pair + side) / S::columns, j = (pair + side) % S::columns;
      const float q0 = code[4 * four][j], q1 = code[4 * four + 1][j];          // k, k + 1
      const float q8 = code[4 * four + 2][j], q9 = code[4 * four + 3][j];      // k + 8, k + 9
      if constexpr (S::side == Side::Key) {
        part[side] = uint32_t(join(join(q0, q8, 16.0f), join(q1, q9, 16.0f), 65536.0f)) << (8 * half);
      } else {
        part[side] = (uint32_t(join(q0, q8, 256.0f)) | uint32_t(join(q1, q9, 256.0f)) << 16) << (4 * half);
      }
    }
    const uint32_t kept = half ? part[1] : part[0], other = __shfl_xor_sync(kWholeWarp, half ? part[0] : part[1], 8);
    const int four = half ? (pair + 1) / S::columns : pair / S::columns, j = half ? (pair + 1) % S::columns : pair % S::columns;
    words[fragment_of<S>(thread, four, j) * 32 + fragment_lane<S>(thread, four)] = kept | other;
  }
}

// Codes to byte words [2 · fragment + h][32].
template <class S>
__device__ __forceinline__ void write_bytes(const float (&code)[S::rows][S::columns], uint32_t* words) {
  const int thread = thread_index(), half = thread / 8 % 2;
#pragma unroll
  for (int four = 0; four < S::rows / 4; ++four) {
#pragma unroll
    for (int j = 0; j < S::columns; ++j) {
      const float q0 = code[4 * four][j], q1 = code[4 * four + 1][j];
      const float q8 = code[4 * four + 2][j], q9 = code[4 * four + 3][j];
      uint32_t word;
      if constexpr (S::side == Side::Key) {
        const uint32_t low = uint32_t(join(q0, q1, 65536.0f)) << (8 * half);
        const uint32_t high = uint32_t(join(q8, q9, 65536.0f)) << (8 * half);
        word = (half ? high : low) | __shfl_xor_sync(kWholeWarp, half ? low : high, 8);
      } else {
        word = uint32_t(join(q0, q8, 256.0f)) | uint32_t(join(q1, q9, 256.0f)) << 16;
      }
      words[(2 * fragment_of<S>(thread, four, j) + half) * 32 + fragment_lane<S>(thread, four)] = word;
    }
  }
}

template <class S>
__device__ __forceinline__ void write_words(const float (&code)[S::rows][S::columns], int bits, uint32_t* words) {
  if (bits == 8) {
    write_bytes<S>(code, words);
  } else {
    write_nibbles<S>(code, words);
  }
}

// Word `word` of `lane` as the record has it.
__device__ __forceinline__ uint32_t record_word(const uint32_t* words, int bits, int word, int lane) {
  const auto at = [=](int fragment) { return words[fragment * 32 + lane]; };
  if (bits == 2) {
    const auto narrow = [](uint32_t n) { return (n & 0x03030303u) | (n >> 2 & 0x0c0c0c0cu); };
    return narrow(at(2 * word)) | narrow(at(2 * word + 1)) << 4;
  }
  if (bits == 3) {
    // Four fragments share three words: three fill bits 3 to 14 of one each, the fourth the bits left over.
    const int part = word % 3, first = word / 3 * 4;
    const uint32_t own = at(first + part), last = at(first + 3);
    const uint32_t mine = last >> (part == 0 ? 0 : part == 1 ? 8 : 4) & 0x00070007u;
    const uint32_t top = (last >> (12 + part) & 0x00010001u) << 15;
    return (own & 0x00070007u) << 3 | (own & 0x00700070u) << 2 | (own & 0x07000700u) << 1 | (own & 0x70007000u) | mine | top;
  }
  return at(word);
}

// All words of a matrix to its place in the record.
template <class S>
__device__ __forceinline__ void store_words(const uint32_t* words, int bits, uint8_t* codes) {
  const int total = code_words(S::D, S::G, bits), whole = total / 4;
  const int thread = thread_index();
  for (int i = thread; i < whole * 32; i += S::threads) {
    const int word = i / 32 * 4, lane = i % 32;
    reinterpret_cast<uint4*>(codes)[i] = {record_word(words, bits, word, lane), record_word(words, bits, word + 1, lane),
                                          record_word(words, bits, word + 2, lane), record_word(words, bits, word + 3, lane)};
  }
  const int rest = total - 4 * whole;
  for (int i = thread; i < rest * 32; i += S::threads) {
    const int lane = i / rest, word = 4 * whole + i % rest;
    *reinterpret_cast<uint32_t*>(codes + code_word_byte(total, lane, word)) = record_word(words, bits, word, lane);
  }
}

}  // namespace kvarn
