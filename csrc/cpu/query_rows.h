// SPDX-License-Identifier: Apache-2.0
// Query rows laid out for the tile kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_tiles.h"

namespace kvcompress {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the logits of each of so many rows are multiplied by, [num] float32.
inline at::Tensor row_scales(const at::Tensor& scale, int64_t num) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == num,
              "scale: expected float32 [", num, "]");
  return scale.contiguous();
}

// Rows of one KV head put together one by one, scaled.
class PackedRows {
 public:
  PackedRows(int64_t max_rows, int64_t head_size, double softcap)
      : head_size_(head_size),
        softcap_(static_cast<float>(softcap)),
        values_(ceil_div(max_rows, kRowBlock) * kRowBlock * head_size),
        num_keys_(ceil_div(max_rows, kRowBlock) * kRowBlock) {}

  // Starts anew: queries that are added from now on are multiplied by scale.
  void start(float scale) {
    size_ = 0;
    scale_ = scale;
  }

  // query [head_size] sees keys [0, num_keys)
  void add(const float* query, int64_t num_keys) {
    float* to = &values_[size_ / kRowBlock * kRowBlock * head_size_ + size_ % kRowBlock];
    for (int64_t d = 0; d < head_size_; ++d) to[d * kRowBlock] = query[d] * scale_;
    num_keys_[size_++] = num_keys;
  }

  int64_t size() const { return size_; }

  // Rows [first, first + count), or as many of them as there are; first is a multiple of kRowBlock.
  // What pads them is whatever stood there before.
  QueryRows rows(int64_t first, int64_t count) const {
    count = std::min(count, size_ - first);
    return {&values_[first * head_size_], &num_keys_[first], ceil_div(count, kRowBlock), 1,
            count, head_size_, softcap_};
  }

  // All rows, as those of so many query heads, head by head.
  QueryRows heads(int64_t num_heads) const {
    return {values_.data(), num_keys_.data(), ceil_div(size_, kRowBlock), num_heads,
            size_ / num_heads, head_size_, softcap_};
  }

 private:
  int64_t head_size_, size_ = 0;
  float scale_ = 1.0f, softcap_;
  std::vector<float> values_;      // [max_rows / kRowBlock, D, kRowBlock]
  std::vector<int64_t> num_keys_;  // [max_rows]
};

}  // namespace kvcompress
