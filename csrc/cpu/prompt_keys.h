// SPDX-License-Identifier: Apache-2.0
// Keys of paged prompts, a tile at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"

namespace kvcompress {

// Where the keys of a layer stand in vLLM's CPU cache.
template <typename T>
class PromptKeys {
 public:
  // pages [num_pages, E]; block_table [N, B] int64; key_index [block_size * D] int64, the place of
  // element (token, d) in a page.
  PromptKeys(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
             const at::Tensor& key_index, int64_t head_size)
      : pages_(pages.const_data_ptr<T>()),
        page_elems_(pages.size(1)),
        table_(block_table.contiguous()),
        num_blocks_(block_table.size(1)),
        num_kv_heads_(num_kv_heads),
        block_size_(key_index.numel() / head_size),
        head_size_(head_size),
        places_(key_index.numel()) {
    TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
    TORCH_CHECK(block_table.scalar_type() == at::kLong && key_index.scalar_type() == at::kLong,
                "block_table and key_index: expected int64");
    const at::Tensor source = key_index.contiguous();
    const int64_t* index = source.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < block_size_; ++t) {
      for (int64_t d = 0; d < head_size; ++d) {
        places_[d * block_size_ + t] = static_cast<int32_t>(index[t * head_size + d]);
      }
    }
  }

  // Keys [start, end) of one head as float32, tile [D, kTileKeys]; zeros beyond end. Those of float8
  // pages come without their scale.
  void read_tile(int64_t row, int64_t head, int64_t start, int64_t end, float* tile) const {
    const int64_t* blocks = table_.const_data_ptr<int64_t>() + row * num_blocks_;
    const int64_t count = std::min(end - start, kTileKeys);
    if (count < kTileKeys) std::fill_n(tile, head_size_ * kTileKeys, 0.0f);
    for (int64_t done = 0; done < count;) {
      const int64_t token = (start + done) % block_size_;
      const int64_t run = std::min(block_size_ - token, count - done);
      const int64_t block = blocks[(start + done) / block_size_];
      const T* page = pages_ + (block * num_kv_heads_ + head) * page_elems_;
      for (int64_t d = 0; d < head_size_; ++d) {
        const int32_t* places = places_.data() + d * block_size_ + token;
        float* keys = tile + d * kTileKeys + done;
        for (int64_t j = 0; j < run; ++j) keys[j] = to_float_(page[places[j]]);
      }
      done += run;
    }
  }

 private:
  const T* pages_;
  ToFloat<T> to_float_;
  int64_t page_elems_;
  at::Tensor table_;
  int64_t num_blocks_, num_kv_heads_, block_size_, head_size_;
  std::vector<int32_t> places_;  // [D, block_size]: neighbours in a tile are read in one go
};

}  // namespace kvcompress
