// How a matrix of a tile is spread over a thread block that seals it.
//
// The matrix is [R, C]: K [channels, tokens], V [tokens, channels]; rows are what is quantised. A warp holds whole rows, so
// that row statistics need shuffles only; lane l holds columns l, l + 32, l + 64 … A thread's rows come in fours: k, k + 1,
// k + 8, k + 9 of a 16 × 16 fragment, which with columns m and m + 8 (held by lane l ^ 8) are the eight codes of one word of
// the record. About 32 elements per thread stay in registers from load to code: 64 registers, 32 warps per multiprocessor.
#pragma once
#include "layout.cuh"

namespace kvarn {

enum class Side { Key, Value };

template <Side side_, int D_, int G_>
struct Shape {
  static constexpr Side side = side_;
  static constexpr int D = D_, G = G_;
  static_assert(D == 64 || D == 96 || D == 128 || D == 256, "head dims with kernels");
  static_assert(G == 64 || G == 128, "tokens of a tile");

  static constexpr int R = side == Side::Key ? D : G;
  static constexpr int C = side == Side::Key ? G : D;
  static constexpr int columns = C / 32;                            // of a thread
  static constexpr int rows = columns == 2 ? 16 : columns == 8 ? 4 : 8;  // of a warp
  static constexpr int warps = R / rows;
  static constexpr int threads = 32 * warps;

  // Threads that together own a column: they add up what the warps found.
  static constexpr int owners = threads / C >= 8 ? 8 : threads / C >= 4 ? 4 : 2;
  static constexpr int partials = warps / owners;  // of each of them
  static_assert(threads >= 2 * C && warps % owners == 0, "every column needs owners");

  // After a reduction over rows, `copies` neighbouring lanes hold the result of one row.
  static constexpr int copies = 32 / rows;

  // Row i of a warp: a warp holds all fours of a block of 16 rows, two of them or one.
  KVARN_HOST_DEVICE static constexpr int row(int warp, int i) {
    constexpr int warps_of_block = 16 / rows;
    return warp / warps_of_block * 16 + warp % warps_of_block * (rows / 2) + i / 4 * 2 + i % 2 + i / 2 % 2 * 8;
  }
};

// Threads of a block that appends: the larger side's; the other side's last warps leave at once.
template <int D, int G>
constexpr int append_threads = Shape<Side::Key, D, G>::threads > Shape<Side::Value, D, G>::threads
                                   ? Shape<Side::Key, D, G>::threads
                                   : Shape<Side::Value, D, G>::threads;

// Shared memory of a block that seals, in bytes from its start.
template <class S>
struct SealMemory {
  static constexpr int aligned(int bytes) { return (bytes + 15) / 16 * 16; }

  // The tile as halves, token by token. K is read by columns of tokens: an odd number of words keeps them apart.
  static constexpr int token_halves = S::side == Side::Key ? S::D + 2 : S::D;
  static constexpr int tile = 0;
  // Column sums of each warp: three planes of floats or one of float pairs.
  static constexpr int plane = S::warps * (S::C + 1);
  static constexpr int partial = aligned(2 * S::G * token_halves);
  static constexpr int row = partial + aligned(4 * plane * (S::side == Side::Key ? 3 : 2));
  static constexpr int row_scale = row + 16 * S::R;        // float[R], in the order of the warps' rows
  static constexpr int column = row_scale + 4 * S::R;      // float[C]
  static constexpr int column_log = column + 4 * S::C;     // float[C]
  static constexpr int row_spread = column_log + 4 * S::C; // float2[2][32]
  static constexpr int column_spread = row_spread + 512;   // float2[32]
  static constexpr int guard = column_spread + 256;        // float[4][32]
  static constexpr int prescale = guard + 512;             // int
  static constexpr int bytes = prescale + 16;

  // Once the tile is encoded its place holds the words of codes, and that of the column sums the parameters.
  static_assert(2 * S::G * token_halves >= S::D * S::G, "words of 8-bit codes fit");
  static_assert(row - partial >= 4 * S::R + 2 * S::C, "parameters fit");
};

template <int D, int G>
constexpr int append_shared_bytes = SealMemory<Shape<Side::Key, D, G>>::bytes > SealMemory<Shape<Side::Value, D, G>>::bytes
                                        ? SealMemory<Shape<Side::Key, D, G>>::bytes
                                        : SealMemory<Shape<Side::Value, D, G>>::bytes;

}  // namespace kvarn
