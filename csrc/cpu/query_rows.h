// SPDX-License-Identifier: Apache-2.0
// Query rows laid out for the tile kernels.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "attention_tiles.h"

namespace kvcompress {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Two bfloat16, of which only the bits are known, in the place of a float.
inline float pair_of(uint16_t first, uint16_t second) {
  return std::bit_cast<float>(static_cast<uint32_t>(second) << 16 | first);
}

// What the logits of each of so many rows are multiplied by, [num] float32.
inline at::Tensor row_scales(const at::Tensor& scale, int64_t num) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == num,
              "scale: expected float32 [", num, "]");
  return scale.contiguous();
}

// Rows of one KV head put together one by one.
class PackedRows {
 public:
  // pairs: as in QueryRows; queries are bfloat16 numbers then.
  PackedRows(int64_t max_rows, int64_t head_size, double softcap, bool pairs = false)
      : depth_(pairs ? head_size / 2 : head_size),
        pairs_(pairs),
        softcap_(static_cast<float>(softcap)),
        values_(ceil_div(max_rows, kRowBlock) * kRowBlock * depth_),
        num_keys_(ceil_div(max_rows, kRowBlock) * kRowBlock) {}

  // Starts anew, with a scale for the logits of all rows.
  void start(float scale) {
    size_ = 0;
    scale_ = scale;
  }

  // query [head_size] sees keys [0, num_keys)
  void add(const float* query, int64_t num_keys) {
    float* to = &values_[size_ / kRowBlock * kRowBlock * depth_ + size_ % kRowBlock];
    for (int64_t d = 0; d < depth_; ++d) {
      to[d * kRowBlock] = pairs_ ? pair_of(c10::BFloat16(query[2 * d]).x,
                                           c10::BFloat16(query[2 * d + 1]).x) : query[d];
    }
    num_keys_[size_++] = num_keys;
  }

  // The same of bfloat16 numbers, to rows in pairs: two neighbours are a pair already.
  void add(const c10::BFloat16* query, int64_t num_keys) {
    float* to = &values_[size_ / kRowBlock * kRowBlock * depth_ + size_ % kRowBlock];
    for (int64_t d = 0; d < depth_; ++d) {
      to[d * kRowBlock] = pair_of(query[2 * d].x, query[2 * d + 1].x);
    }
    num_keys_[size_++] = num_keys;
  }

  int64_t size() const { return size_; }

  // Rows [first, first + count), or as many of them as there are; first is a multiple of kRowBlock.
  // What pads them is whatever stood there before.
  QueryRows rows(int64_t first, int64_t count) const {
    count = std::min(count, size_ - first);
    return {&values_[first * depth_], &num_keys_[first], ceil_div(count, kRowBlock), count,
            depth_, pairs_, scale_, softcap_};
  }

 private:
  int64_t depth_, size_ = 0;
  bool pairs_;
  float scale_ = 1.0f, softcap_;
  std::vector<float> values_;      // [max_rows / kRowBlock, depth, kRowBlock]
  std::vector<int64_t> num_keys_;  // [max_rows]
};

}  // namespace kvcompress
