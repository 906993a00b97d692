// SPDX-License-Identifier: Apache-2.0
// Attention of any rows on the keys of one prompt, by logits and exponentials that are taken once.
//
// The exponentials of a panel of rows on all keys are in memory at the same time, those of a few
// rows and in most cases in the cache; keys are read from their pages once.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "aligned.h"
#include "attention_tiles.h"
#include "prompt_keys.h"
#include "query_rows.h"

namespace kvcompress {

// Keys of one prompt as float32 or pairs: those of some tiles, of all KV heads.
struct KeyTiles {
  const float* head(int64_t head) const { return &values[head * starts.size() * tile_size]; }

  int64_t num_keys() const { return static_cast<int64_t>(starts.size()) * kTileKeys; }

  std::vector<int64_t> starts;  // position of the first key of each tile, ascending
  int64_t tile_size;            // depth * kTileKeys
  bool pairs;                   // as in QueryRows
  AlignedFloats values;         // [Hkv, tiles, depth, kTileKeys], zeros from the prompt's end on
};

// Whether products of these queries and keys are exact in pairs of bfloat16, and known here.
inline bool in_pairs(const at::Tensor& queries, const at::Tensor& pages) {
  return queries.scalar_type() == at::kBFloat16 && pages.scalar_type() == at::kBFloat16 &&
         queries.size(-1) % 2 == 0 && tile_kernels().has_pairs;
}

template <typename T>
KeyTiles read_tiles(const PromptKeys<T>& keys, int64_t row, int64_t num_kv_heads,
                    std::vector<int64_t> starts, int64_t prompt_len) {
  const int64_t num_tiles = static_cast<int64_t>(starts.size());
  KeyTiles tiles{std::move(starts), keys.depth() * kTileKeys, keys.pairs(), {}};
  tiles.values.resize(num_kv_heads * num_tiles * tiles.tile_size);
  at::parallel_for(0, num_kv_heads * num_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      keys.read_tile(row, i / num_tiles, tiles.starts[i % num_tiles], prompt_len,
                     &tiles.values[i * tiles.tile_size]);
    }
  });
  return tiles;
}

// The same of all keys before the prompt's end.
template <typename T>
KeyTiles read_tiles(const PromptKeys<T>& keys, int64_t row, int64_t num_kv_heads,
                    int64_t prompt_len) {
  std::vector<int64_t> starts;
  for (int64_t t = 0; t < prompt_len; t += kTileKeys) starts.push_back(t);
  return read_tiles(keys, row, num_kv_heads, std::move(starts), prompt_len);
}

// Attention of rows on the keys of some tiles; one thread's.
class RowAttention {
 public:
  explicit RowAttention(const KeyTiles& tiles)
      : out(tiles.num_keys()),
        last(tiles.num_keys()),
        tiles_(tiles),
        panel_rows_(std::max(kLeastRows, kPanelFloats / tiles.num_keys() / kRowBlock * kRowBlock)) {
  }

  // Overwrites out with the probabilities of rows of a KV head, summed over the rows, times weight,
  // and last with those of the last row. hidden: [num_keys] of the tiles, true for keys that none
  // of the rows looks at; or nullptr.
  void run(const PackedRows& rows, int64_t head, const uint8_t* hidden, float weight) {
    std::fill(out.begin(), out.end(), 0.0f);
    std::fill(last.begin(), last.end(), 0.0f);
    for (int64_t first = 0; first < rows.size(); first += panel_rows_) {
      const QueryRows panel = rows.rows(first, panel_rows_);
      const int64_t seen = *std::max_element(panel.num_keys, panel.num_keys + panel.num_rows);
      const auto& starts = tiles_.starts;
      num_tiles_ = std::lower_bound(starts.begin(), starts.end(), seen) - starts.begin();
      const int64_t num_keys = num_tiles_ * kTileKeys;
      stride_ = num_keys + kPadding;
      exps_.resize(panel.num_blocks * kRowBlock * stride_);
      weights_.resize(panel.num_rows);
      if (num_tiles_ == 0) continue;
      take_exps(panel, tiles_.head(head), hidden);
      for (float& share : weights_) share = 1.0f / share;
      const TileKernels& kernels = tile_kernels();
      if (first + panel.num_rows == rows.size()) {
        const int64_t r = panel.num_rows - 1;
        kernels.add_rows(&exps_[r * stride_], stride_, 1, &weights_[r], num_keys, last.data());
      }
      for (float& share : weights_) share *= weight;
      kernels.add_rows(exps_.data(), stride_, panel.num_rows, weights_.data(), num_keys,
                       out.data());
    }
  }

  AlignedFloats out, last;  // [num_keys] of the tiles

 private:
  // Exponentials of a panel's logits, the largest being subtracted, and their sums as weights.
  void take_exps(const QueryRows& panel, const float* tile, const uint8_t* hidden) {
    const TileKernels& kernels = tile_kernels();
    const int64_t num_keys = num_tiles_ * kTileKeys;
    tops_.assign(panel.num_blocks * kRowBlock * kMaxLanes, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < num_tiles_; ++i, tile += tiles_.tile_size) {
      kernels.logits(panel, tile, tiles_.starts[i], &exps_[i * kTileKeys], stride_, tops_.data());
    }
    for (int64_t r = 0; r < panel.num_rows; ++r) {
      float* row = &exps_[r * stride_];
      for (int64_t j = 0; hidden != nullptr && j < num_keys; ++j) {
        row[j] = hidden[j] ? -std::numeric_limits<float>::infinity() : row[j];
      }
      const float* lanes = &tops_[r * kMaxLanes];
      const float top = hidden != nullptr ? kernels.largest(row, num_keys)
                                          : *std::max_element(lanes, lanes + kMaxLanes);
      weights_[r] = kernels.exp_row(row, num_keys, top);
    }
  }

  // 128 KiB of exponentials; of longer prompts more, because each panel takes all keys through the
  // cache
  static constexpr int64_t kPanelFloats = int64_t{1} << 15, kLeastRows = 2 * kRowBlock;
  // floats between rows, so that those of 2^n keys do not compete for the same lines of the cache
  static constexpr int64_t kPadding = kMaxLanes;

  const KeyTiles& tiles_;
  int64_t panel_rows_, num_tiles_ = 0, stride_ = 0;
  AlignedFloats exps_;          // [panel_rows, stride_], of which the keys that the panel sees
  std::vector<float> weights_;  // [panel_rows]
  AlignedFloats tops_;          // [panel_rows, kMaxLanes]
};

// Query tokens of one prompt: queries [count, Hq, D], float32 or, for tiles in pairs, bfloat16.
// Token r sees seen + r * more keys.
template <typename T>
struct QueryTokens {
  const T* queries;
  int64_t count, num_kv_heads, group, head_size, seen, more;
  float scale;
  double softcap;
};

// Attention of each of num_parts runs of per_part tokens, summed over them, mean over query heads.
// out [Hkv, num_parts, stride], of which the first num_keys columns are written.
template <typename T>
void attend_parts(const QueryTokens<T>& x, const KeyTiles& tiles, int64_t per_part,
                         int64_t num_parts, int64_t num_keys, int64_t stride, float* out) {
  at::parallel_for(0, x.num_kv_heads * num_parts, 1, [&](int64_t begin, int64_t end) {
    PackedRows rows(per_part * x.group, x.head_size, x.softcap, tiles.pairs);
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
