// SPDX-License-Identifier: Apache-2.0
// Keys of paged prompts, a tile at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"
#include "query_rows.h"

namespace kvcompress {

// Where the keys of a layer stand in vLLM's CPU cache.
template <typename T>
class PromptKeys {
 public:
  // pages [num_pages, E]; block_table [N, B] int64; key_index [block_size * D] int64, the place of
  // element (token, d) in a page. pairs: tiles are to be as in QueryRows; for bfloat16 pages.
  PromptKeys(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
             const at::Tensor& key_index, int64_t head_size, bool pairs = false)
      : pages_(pages.const_data_ptr<T>()),
        page_elems_(pages.size(1)),
        table_(block_table.contiguous()),
        num_blocks_(block_table.size(1)),
        num_kv_heads_(num_kv_heads),
        block_size_(key_index.numel() / head_size),
        depth_(pairs ? head_size / 2 : head_size),
        pairs_(pairs),
        places_(key_index.numel()) {
    TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
    TORCH_CHECK(block_table.scalar_type() == at::kLong && key_index.scalar_type() == at::kLong,
                "block_table and key_index: expected int64");
    const at::Tensor source = key_index.contiguous();
    const int64_t* index = source.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < block_size_; ++t) {
      for (int64_t d = 0; d < head_size; ++d) {
        places_[d * block_size_ + t] = static_cast<int32_t>(index[t * head_size + d]);
        consecutive_ &= places_[d * block_size_ + t] == places_[d * block_size_] + t;
      }
    }
  }

  int64_t depth() const { return depth_; }

  bool pairs() const { return pairs_; }

  // Keys [start, end) of one head as float32 or pairs, tile [depth, kTileKeys]; zeros beyond end.
  // Those of float8 pages come without their scale.
  void read_tile(int64_t row, int64_t head, int64_t start, int64_t end, float* tile) const {
    const int64_t* blocks = table_.const_data_ptr<int64_t>() + row * num_blocks_;
    const int64_t count = std::min(end - start, kTileKeys);
    if (count < kTileKeys) std::fill_n(tile, depth_ * kTileKeys, 0.0f);
    for (int64_t done = 0; done < count;) {
      const int64_t token = (start + done) % block_size_;
      const int64_t run = std::min(block_size_ - token, count - done);
      const int64_t block = blocks[(start + done) / block_size_];
      const T* page = pages_ + (block * num_kv_heads_ + head) * page_elems_;
      const int32_t* places = places_.data() + token;
      if (consecutive_) {
        copy(page, run, tile + done,
             [&](int64_t d, int64_t j) { return places[d * block_size_] + j; });
      } else {
        copy(page, run, tile + done,
             [&](int64_t d, int64_t j) { return places[d * block_size_ + j]; });
      }
      done += run;
    }
  }

 private:
  // Neighbouring keys, of which element d of key j stands at place(d, j).
  template <typename Place>
  void copy(const T* page, int64_t count, float* tile, Place place) const {
    for (int64_t i = 0; i < depth_; ++i, tile += kTileKeys) {
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        for (int64_t j = 0; pairs_ && j < count; ++j) {
          tile[j] = pair_of(page[place(2 * i, j)].x, page[place(2 * i + 1, j)].x);
        }
        if (pairs_) continue;
      }
      for (int64_t j = 0; j < count; ++j) tile[j] = to_float_(page[place(i, j)]);
    }
  }

  const T* pages_;
  ToFloat<T> to_float_;
  int64_t page_elems_;
  at::Tensor table_;
  int64_t num_blocks_, num_kv_heads_, block_size_, depth_;
  bool pairs_, consecutive_ = true;
  std::vector<int32_t> places_;  // [D, block_size]: neighbours in a tile are read in one go
};

}  // namespace kvcompress
