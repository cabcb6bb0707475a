// Offsets within a record. The source is crates/kvarn/src/record/layout.rs; a test of kvarn-cuda compiles this header
// for the host and compares every constant with it.
#pragma once

#ifdef __CUDACC__
#define KVARN_HOST_DEVICE __host__ __device__
#else
#define KVARN_HOST_DEVICE
#endif

namespace kvarn {

// Byte offsets of the arrays of a record of G tokens and D channels.
template <int D_, int G_, int KeyBits, int ValueBits>
struct Layout {
  static constexpr int D = D_, G = G_, key_bits = KeyBits, value_bits = ValueBits;

  static constexpr int key_codes = 0;
  static constexpr int key_channel_scale = D * G * KeyBits / 8;
  static constexpr int key_channel_zero = key_channel_scale + 2 * D;
  static constexpr int key_token_scale = key_channel_zero + 2 * D;
  static constexpr int key_end = key_token_scale + 2 * G;

  static constexpr int value_codes = key_end;
  static constexpr int value_channel_scale = value_codes + D * G * ValueBits / 8;
  static constexpr int value_token_scale = value_channel_scale + 2 * D;
  static constexpr int value_token_zero = value_token_scale + 2 * G;
  static constexpr int value_end = value_token_zero + 2 * G;

  static constexpr int record_bytes = (value_end + 127) / 128 * 128;
};

// Byte offset of parameter i of n in row order (K token scale, V channel scale).
KVARN_HOST_DEVICE constexpr int row_order(int i, int n) {
  return (i % 8) * (n / 16) * 4 + (i / 16) * 4 + (i % 16 / 8) * 2;
}

// Byte offset of parameter i of n in k order (K channel scale and zero, V token scale and zero).
KVARN_HOST_DEVICE constexpr int k_order(int i, int n) {
  return (i % 8 / 2) * (n / 16) * 8 + (i / 16) * 8 + (i % 16 / 8) * 4 + (i % 2) * 2;
}

// 32-bit words of codes that each lane holds, and the byte offset of one of them.
KVARN_HOST_DEVICE constexpr int code_words(int D, int G, int bits) { return D * G * bits / 1024; }

KVARN_HOST_DEVICE constexpr int code_word_byte(int words, int lane, int word) {
  const int whole = words / 4 * 4, rest = words - whole;
  return word < whole ? word / 4 * 512 + 16 * lane + 4 * (word % 4) : 128 * whole + 4 * rest * lane + 4 * (word - whole);
}

// Whether the place of a 3-bit code depends on its slice too: where a slice is no multiple of four fragments.
KVARN_HOST_DEVICE constexpr bool mixed_places(int D, int bits) { return bits == 3 && D % 64 != 0; }

// Lowest bit of the codes of a fragment (counted within its slice) in half precision: a code enters the tensor cores with
// the weight 2^place. `half` is the k half for K and the row half for V.
KVARN_HOST_DEVICE constexpr int place(int D, int bits, int fragment, int half) {
  return bits == 4                                                   ? 4 * half
         : bits == 2                                                 ? 4 * (fragment % 2) + 2 * half
         : bits == 8                                                 ? 0
         : bits == 3 && !mixed_places(D, bits) && fragment % 4 == 3 ? 0
                                                                     : 3 + 3 * half;
}

}  // namespace kvarn
