// Packed codes to tensor-core fragments.
//
// A mask puts two codes at mantissa bit `place` of two halves: the fp16 subnormals code * 2^(place - 24), which the tensor
// cores take exactly and at full speed. Nothing is subtracted, scaled or biased here; the weight 2^(place - 24) is folded
// into queries (K, by channel half) or into the output's scale (V, by row half), where it is free.
//
// Word order: docs/format.md. A slice is 16 tokens; its fragments are `D / 16` consecutive ones, for K and V alike.
#pragma once
#include "layout.cuh"
#include "mma.cuh"

namespace kvarn {

constexpr int kSubnormal = -24;  // exponent of the weight of mantissa bit 0

// Words of codes that a lane holds per slice, in quarters of a word where 3-bit fragments share words.
__host__ __device__ constexpr int words_of(int D, int bits, int slices) { return slices * D * bits / 64; }

// Slices whose words begin and end at a 16-byte boundary of a lane's words (or all slices of the tile).
__host__ __device__ constexpr int slices_per_load(int D, int G, int bits) {
  int s = 1;
  while (s * D * bits % 256 != 0 && s < G / 16) s *= 2;
  return s;
}

// Words of `slices` slices, from slice `first` of the tile's codes at `codes` (shared memory).
template <int D, int G, int Bits, int Slices>
__device__ __forceinline__ void load_words(uint32_t (&w)[words_of(D, Bits, Slices)], const unsigned char* codes, int first, int lane) {
  constexpr int n = words_of(D, Bits, Slices), all = code_words(D, G, Bits);
  if constexpr (n % 4 == 0) {
    const unsigned char* p = codes + first / Slices * (n / 4) * 512 + lane * 16;
#pragma unroll
    for (int i = 0; i < n / 4; i++) load128(w + 4 * i, p + i * 512);
  } else {
    static_assert(Slices == G / 16, "a load that is no multiple of 16 bytes holds the whole tile");
#pragma unroll
    for (int i = 0; i < n; i++) w[i] = *reinterpret_cast<const uint32_t*>(codes + code_word_byte(all, lane, i));
  }
}

// Register of an A fragment that holds the codes of place-value class h and extraction u.
template <bool Key>
__host__ __device__ constexpr int fragment_register(int h, int u) {
  return Key ? u + 2 * h : h + 2 * u;
}

// Fragment `i`, counted from the first one of `w`.
template <int Bits, bool Key>
__device__ __forceinline__ void expand_codes(const uint32_t* w, int i, uint32_t (&f)[4]) {
  constexpr int r00 = fragment_register<Key>(0, 0), r10 = fragment_register<Key>(1, 0);
  constexpr int r01 = fragment_register<Key>(0, 1), r11 = fragment_register<Key>(1, 1);
  if constexpr (Bits == 8) {
    const uint32_t x = w[2 * i], y = w[2 * i + 1];
    f[r00] = x & 0x00ff00ffu, f[r01] = x >> 8 & 0x00ff00ffu;
    f[r10] = y & 0x00ff00ffu, f[r11] = y >> 8 & 0x00ff00ffu;
  } else if constexpr (Bits == 4) {
    const uint32_t x = w[i], y = x >> 8;
    f[r00] = x & 0x000f000fu, f[r10] = x & 0x00f000f0u;
    f[r01] = y & 0x000f000fu, f[r11] = y & 0x00f000f0u;
  } else if constexpr (Bits == 2) {
    const uint32_t x = w[i / 2], y = x >> 8;
    if (i & 1) {
      f[r00] = x & 0x00300030u, f[r10] = x & 0x00c000c0u, f[r01] = y & 0x00300030u, f[r11] = y & 0x00c000c0u;
    } else {
      f[r00] = x & 0x00030003u, f[r10] = x & 0x000c000cu, f[r01] = y & 0x00030003u, f[r11] = y & 0x000c000cu;
    }
  } else {
    const uint32_t* v = w + i / 4 * 3;
    if (i % 4 < 3) {
      const uint32_t x = v[i % 4], y = x >> 6;
      f[r00] = x & 0x00380038u, f[r10] = x & 0x01c001c0u, f[r01] = y & 0x00380038u, f[r11] = y & 0x01c001c0u;
    } else {
      f[r00] = v[0] & 0x00070007u, f[r01] = v[1] & 0x00070007u, f[r10] = v[2] & 0x00070007u;
      f[r11] = (v[0] >> 15 & 0x00010001u) | (v[1] >> 14 & 0x00020002u) | (v[2] >> 13 & 0x00040004u);
    }
  }
}

// Fragments of a slice are of this many kinds, alike in their places: the kind of fragment `i`.
template <int Bits>
__host__ __device__ constexpr int place_kind(int i) {
  return Bits == 2 ? i % 2 : Bits == 3 ? i % 4 == 3 : 0;
}
template <int Bits>
__host__ __device__ constexpr int place_kinds() {
  return Bits == 2 || Bits == 3 ? 2 : 1;
}
// A fragment of that kind.
template <int Bits>
__host__ __device__ constexpr int kind_example(int kind) {
  return Bits == 3 ? 3 * kind : kind;
}

}  // namespace kvarn
