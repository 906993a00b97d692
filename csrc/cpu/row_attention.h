// SPDX-License-Identifier: Apache-2.0
// Attention of any rows on the keys of one prompt, by exponentials that are taken once.
//
// The logits of a panel of rows on all keys are in memory at the same time, those of a few rows and
// in most cases in the cache; keys are read from their pages once.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "attention_tiles.h"
#include "prompt_keys.h"
#include "query_rows.h"

namespace kvcompress {

// Keys of one prompt as float32: those of some tiles, of all KV heads.
struct KeyTiles {
  const float* head(int64_t head) const { return &values[head * starts.size() * tile_size]; }

  int64_t num_keys() const { return static_cast<int64_t>(starts.size()) * kTileKeys; }

  std::vector<int64_t> starts;  // position of the first key of each tile, ascending
  int64_t tile_size;            // head_size * kTileKeys
  std::vector<float> values;    // [Hkv, tiles, D, kTileKeys], zeros at and after the prompt's end
};

template <typename T>
KeyTiles read_tiles(const PromptKeys<T>& keys, int64_t request, int64_t num_kv_heads,
                    int64_t head_size, std::vector<int64_t> starts, int64_t prompt_len) {
  const int64_t num_tiles = static_cast<int64_t>(starts.size());
  KeyTiles tiles{std::move(starts), head_size * kTileKeys, {}};
  tiles.values.resize(num_kv_heads * num_tiles * tiles.tile_size);
  at::parallel_for(0, num_kv_heads * num_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      keys.read_tile(request, i / num_tiles, tiles.starts[i % num_tiles], prompt_len,
                     &tiles.values[i * tiles.tile_size]);
    }
  });
  return tiles;
}

// The same of all keys before the prompt's end.
template <typename T>
KeyTiles read_tiles(const PromptKeys<T>& keys, int64_t request, int64_t num_kv_heads,
                    int64_t head_size, int64_t prompt_len) {
  std::vector<int64_t> starts;
  for (int64_t t = 0; t < prompt_len; t += kTileKeys) starts.push_back(t);
  return read_tiles(keys, request, num_kv_heads, head_size, std::move(starts), prompt_len);
}

// Sums of attention of rows on the keys of some tiles; one thread's.
class RowAttention {
 public:
  explicit RowAttention(const KeyTiles& tiles)
      : out(tiles.num_keys()),
        tiles_(tiles),
        panel_rows_(std::max(kLeastRows, kPanelFloats / tiles.num_keys() / kRowBlock * kRowBlock)) {
  }

  // Overwrites out with the probabilities of rows of a KV head, summed over the rows, times weight.
  // hidden: [num_keys] of the tiles, true for keys that none of the rows looks at; or nullptr.
  void run(const PackedRows& rows, int64_t head, const uint8_t* hidden, float weight) {
    const TileKernels& kernels = tile_kernels();
    const auto& starts = tiles_.starts;
    std::fill(out.begin(), out.end(), 0.0f);
    logits_.resize(std::min(panel_rows_, ceil_div(rows.size(), kRowBlock) * kRowBlock) *
                   tiles_.num_keys());
    for (int64_t first = 0; first < rows.size(); first += panel_rows_) {
      const QueryRows panel = rows.rows(first, panel_rows_);
      const int64_t seen = *std::max_element(panel.num_keys, panel.num_keys + panel.rows_per_head);
      const int64_t num_tiles = std::lower_bound(starts.begin(), starts.end(), seen) - starts.begin();
      const int64_t num_keys = num_tiles * kTileKeys;
      const float* tile = tiles_.head(head);
      for (int64_t i = 0; i < num_tiles; ++i, tile += tiles_.tile_size) {
        kernels.logits(panel, tile, starts[i], &logits_[i * kTileKeys], num_keys);
      }
      for (int64_t r = 0; r < panel.rows_per_head; ++r) {
        float* row = &logits_[r * num_keys];
        for (int64_t j = 0; hidden != nullptr && j < num_keys; ++j) {
          row[j] = hidden[j] ? -std::numeric_limits<float>::infinity() : row[j];
        }
        kernels.add_softmax(row, num_keys, weight, out.data());
      }
    }
  }

  std::vector<float> out;  // [num_keys] of the tiles

 private:
  // 1 MiB of logits; of longer prompts more, because each panel takes all keys through the cache
  static constexpr int64_t kPanelFloats = int64_t{1} << 18, kLeastRows = 4 * kRowBlock;

  const KeyTiles& tiles_;
  int64_t panel_rows_;
  std::vector<float> logits_;  // [panel_rows, num_keys]
};

// Query tokens of one prompt: queries [count, Hq, D] float32. Token r sees seen + r * more keys.
struct QueryTokens {
  const float* queries;
  int64_t count, num_kv_heads, group, head_size, seen, more;
  float scale;
  double softcap;
};

// Attention of each of num_parts runs of per_part tokens, summed over them, mean over query heads.
// out [Hkv, num_parts, stride], of which the first num_keys columns are written.
inline void attend_parts(const QueryTokens& x, const KeyTiles& tiles, int64_t per_part,
                         int64_t num_parts, int64_t num_keys, int64_t stride, float* out) {
  at::parallel_for(0, x.num_kv_heads * num_parts, 1, [&](int64_t begin, int64_t end) {
    PackedRows rows(per_part * x.group, x.head_size, x.softcap);
    RowAttention attention(tiles);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / num_parts, first = i % num_parts * per_part;
      rows.start(x.scale);
      for (int64_t r = first; r < std::min(first + per_part, x.count); ++r) {
        for (int64_t g = 0; g < x.group; ++g) {
          rows.add(x.queries + ((r * x.num_kv_heads + head) * x.group + g) * x.head_size,
                   x.seen + r * x.more);
        }
      }
      attention.run(rows, head, nullptr, 1.0f / static_cast<float>(x.group));
      std::copy_n(attention.out.data(), num_keys, out + i * stride);
    }
  });
}

}  // namespace kvcompress
