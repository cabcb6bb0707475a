// Codes of 16 tokens of a record, as pairs of halves that hold the integers as subnormals (q · 2^-24).
//
// A warp reads the words of the slice's D / 16 fragments, lane by lane; `pair` takes two codes, k even in the low half, from
// one word: h and u as in the format (K: h = k div 8, u = m div 8; V: h = m div 8, u = k div 8).
#pragma once
#include "layout.cuh"

namespace kvarn {

template <int bits, int D, int G>
struct SliceCodes {
  static constexpr int total = code_words(D, G, bits);
  // Three-bit codes share words between four fragments; where a slice is no multiple of four it may begin in the middle.
  static constexpr bool split = bits == 3 && D / 16 % 4 != 0;
  static constexpr int count = split ? (D / 16 + 2) / 4 * 3 : D * bits / 64;
  uint32_t words[count];

  __device__ __forceinline__ SliceCodes(const uint8_t* codes, int slice, int lane) {
    const int first = split ? slice * (D / 16) / 4 * 3 : slice * count;
    if constexpr (count % 4 == 0 && total % 4 == 0) {
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        const uint4 raw = __ldg(reinterpret_cast<const uint4*>(codes) + (first / 4 + i) * 32 + lane);
        words[4 * i] = raw.x;
        words[4 * i + 1] = raw.y;
        words[4 * i + 2] = raw.z;
        words[4 * i + 3] = raw.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        words[i] = __ldg(reinterpret_cast<const uint32_t*>(codes + code_word_byte(total, lane, first + i)));
      }
    }
  }

  // Two codes of fragment f, counted from the first whose words are held.
  __device__ __forceinline__ uint32_t pair(int f, int h, int u) const {
    if constexpr (bits == 4) return words[f] >> (8 * u + 4 * h) & 0x000f000fu;
    if constexpr (bits == 8) return words[2 * f + h] >> (8 * u) & 0x00ff00ffu;
    if constexpr (bits == 2) return words[f / 2] >> (8 * u + 4 * (f % 2) + 2 * h) & 0x00030003u;
    const int first = f / 4 * 3, part = f % 4;
    if (part < 3) return words[first + part] >> (3 + 3 * h + 6 * u) & 0x00070007u;
    if (h + u < 2) return words[first + 2 * h + u] & 0x00070007u;
    return (words[first] >> 15 & 0x00010001u) | (words[first + 1] >> 14 & 0x00020002u) | (words[first + 2] >> 13 & 0x00040004u);
  }
};

}  // namespace kvarn
