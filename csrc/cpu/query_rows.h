// SPDX-License-Identifier: Apache-2.0
// Query rows laid out for the tile kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention_tiles.h"

namespace kvcompress {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Consecutive query tokens of one request: tokens [source, source + count) of the batch, at
// positions [position, position + count) of the prompt.
struct QueryBlock {
  int64_t request, source, count, position;
  int64_t end() const { return position + count; }
};

// Queries of some blocks, scaled, as the tile kernels want them: per block and KV head.
class BlockedQueries {
 public:
  // queries: [tokens, Hq, D]
  BlockedQueries(const at::Tensor& queries, std::vector<QueryBlock> query_blocks,
                 int64_t num_kv_heads, double scale, double softcap)
      : blocks(std::move(query_blocks)),
        num_kv_heads(num_kv_heads),
        group(queries.size(1) / num_kv_heads),
        head_size(queries.size(2)),
        softcap_(static_cast<float>(softcap)) {
    int64_t longest = 0;
    for (const QueryBlock& block : blocks) longest = std::max(longest, block.count);
    stride = ceil_div(group * longest, kRowBlock) * kRowBlock;
    values_.resize(blocks.size() * num_kv_heads * stride * head_size);
    num_keys_.resize(blocks.size() * stride);
    const at::Tensor source = queries.to(at::kFloat).contiguous();
    for (size_t b = 0; b < blocks.size(); ++b) fill(b, source.const_data_ptr<float>(), scale);
  }

  QueryRows rows(int64_t block, int64_t head) const {
    const int64_t count = blocks[block].count;
    return {&values_[(block * num_kv_heads + head) * stride * head_size],
            &num_keys_[block * stride],
            ceil_div(group * count, kRowBlock),
            group,
            count,
            head_size,
            softcap_};
  }

  std::vector<QueryBlock> blocks;
  int64_t num_kv_heads, group, head_size;
  int64_t stride;  // rows of a block and head, padding included

 private:
  void fill(int64_t b, const float* queries, double scale) {
    const QueryBlock& block = blocks[b];
    for (int64_t r = 0; r < group * block.count; ++r) {
      num_keys_[b * stride + r] = block.position + r % block.count + 1;
    }
    const float* from = queries + block.source * num_kv_heads * group * head_size;
    for (int64_t w = 0; w < block.count; ++w) {
      for (int64_t q = 0; q < num_kv_heads * group; ++q) {
        const int64_t r = q % group * block.count + w;
        const int64_t first = (b * num_kv_heads + q / group) * stride + r / kRowBlock * kRowBlock;
        float* to = &values_[first * head_size + r % kRowBlock];
        for (int64_t d = 0; d < head_size; ++d) {
          to[d * kRowBlock] = *from++ * static_cast<float>(scale);
        }
      }
    }
  }

  float softcap_;
  std::vector<float> values_;      // [blocks, Hkv, stride / kRowBlock, D, kRowBlock]
  std::vector<int64_t> num_keys_;  // [blocks, stride]
};

// Rows of one KV head put together one by one, scaled.
class PackedRows {
 public:
  PackedRows(int64_t max_rows, int64_t head_size, double scale, double softcap)
      : head_size_(head_size),
        scale_(static_cast<float>(scale)),
        softcap_(static_cast<float>(softcap)),
        values_(ceil_div(max_rows, kRowBlock) * kRowBlock * head_size),
        num_keys_(ceil_div(max_rows, kRowBlock) * kRowBlock) {}

  // query [head_size] sees keys [0, num_keys)
  void add(const float* query, int64_t num_keys) {
    float* to = &values_[size_ / kRowBlock * kRowBlock * head_size_ + size_ % kRowBlock];
    for (int64_t d = 0; d < head_size_; ++d) to[d * kRowBlock] = query[d] * scale_;
    num_keys_[size_++] = num_keys;
  }

  void clear() { size_ = 0; }

  int64_t size() const { return size_; }

  // Rows [first, first + count), or as many of them as there are; first is a multiple of kRowBlock.
  // What pads them is whatever stood there before.
  QueryRows rows(int64_t first, int64_t count) const {
    count = std::min(count, size_ - first);
    return {&values_[first * head_size_], &num_keys_[first], ceil_div(count, kRowBlock), 1,
            count, head_size_, softcap_};
  }

 private:
  int64_t head_size_, size_ = 0;
  float scale_, softcap_;
  std::vector<float> values_;      // [max_rows / kRowBlock, D, kRowBlock]
  std::vector<int64_t> num_keys_;  // [max_rows]
};

}  // namespace kvcompress
