// SPDX-License-Identifier: Apache-2.0
// Attention of some query rows on one tile of keys, and what is summed up from it.

#pragma once

#include <cstdint>

// Kernels for AVX-512 and AVX2 are compiled beside the portable ones and chosen where the processor
// has them; the rest of the library stays as portable as the compiler's flags.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KV_X86_KERNELS
#endif

namespace kvcompress {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kRowBlock = 8;
constexpr int64_t kMaxLanes = 16;

// Query rows of one KV head. Their logits are scale times the products with the keys.
struct QueryRows {
  const float* values;      // [num_blocks, depth, kRowBlock]; the last block may be padded
  const int64_t* num_keys;  // [num_blocks * kRowBlock]; row r sees keys [0, num_keys[r])
  int64_t num_blocks;
  int64_t num_rows;
  int64_t depth;  // head_size, or half of it in pairs
  bool pairs;     // two bfloat16 in the place of each float, in tiles of keys, too; processors take
                  // denormal ones for 0, which moves a product by 2^-126 times the other factor
  float scale, softcap;
};

struct TileKernels {
  // Logits of each row, padding included, on the keys of a tile [depth, kTileKeys]; -inf on
  // those that it does not see. logits [num_blocks * kRowBlock, stride], of which the first
  // kTileKeys columns are written. tops [num_blocks * kRowBlock, kMaxLanes]: the largest of a row
  // is the largest of its lanes, which are raised to what is written; or nullptr.
  void (*logits)(const QueryRows& rows, const float* tile, int64_t start, float* logits,
                 int64_t stride, float* tops);

  // The largest of one row of logits [num_keys], a multiple of kTileKeys. As in tops, NaN do not
  // count.
  float (*largest)(const float* logits, int64_t num_keys);

  // Turns such a row into exp(logit - top), 0 in the place of denormal numbers; returns their sum.
  // top is the largest.
  float (*exp_row)(float* logits, int64_t num_keys, float top);

  // Adds weighted rows [num_rows, stride] to out [num_keys], a multiple of kTileKeys.
  void (*add_rows)(const float* values, int64_t stride, int64_t num_rows, const float* weights,
                   int64_t num_keys, float* out);

  // Adds k^T (A k + linear) for each key k of a tile to out [kTileKeys], where the rows of A stand
  // as query rows. linear [num_rows].
  void (*quadratic)(const QueryRows& rows, const float* linear, const float* tile, float* out);

  bool has_pairs;  // knows pairs of bfloat16
};

// The kernels for the processor that this runs on.
const TileKernels& tile_kernels();

}  // namespace kvcompress
