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

// Scaled query rows of one KV head: G query heads with rows_per_head rows each, head by head.
struct QueryRows {
  const float* values;      // [num_blocks, head_size, kRowBlock]; the last block may be padded
  const int64_t* num_keys;  // [num_blocks * kRowBlock]; row r sees keys [0, num_keys[r]), padding 0
  int64_t num_blocks;
  int64_t num_heads;
  int64_t rows_per_head;
  int64_t head_size;
  float softcap;  // 0: none
};

struct TileKernels {
  // Online softmax, one for each lane of each row: the largest logit seen so far, and the sum of
  // exp(logit - largest). Tile [head_size, kTileKeys] of keys start ..; max and sum
  // [num_blocks * kRowBlock, kMaxLanes], at first -inf and 0.
  void (*absorb)(const QueryRows& rows, const float* tile, int64_t start, float* max, float* sum);

  // Statistics of all lanes of some chunks of tiles as one: the largest logit, and the inverse of
  // the sum of exp(logit - largest). max, sum [num_chunks, num_rows, kMaxLanes]; results [rows].
  void (*merge)(const float* max, const float* sum, int64_t num_chunks, int64_t num_rows,
                float* row_max, float* row_inverse);

  // Probabilities exp(logit - max) * inverse of the visible keys: their sum over the rows of each
  // query head, and those of its last row. max, inverse [rows]; sums, lasts [G, kTileKeys],
  // overwritten.
  void (*sum)(const QueryRows& rows, const float* tile, int64_t start, const float* max,
              const float* inverse, float* sums, float* lasts);

  // Logits of each row, padding included, on the keys of a tile; -inf on those that it does not see.
  // logits [num_blocks * kRowBlock, stride], of which the first kTileKeys columns are written.
  void (*logits)(const QueryRows& rows, const float* tile, int64_t start, float* logits,
                 int64_t stride);

  // Adds weight times the softmax of one row of logits to out, both [num_keys], a multiple of
  // kTileKeys. Overwrites the logits.
  void (*add_softmax)(float* logits, int64_t num_keys, float weight, float* out);
};

// The kernels for the processor that this runs on.
const TileKernels& tile_kernels();

}  // namespace kvcompress
