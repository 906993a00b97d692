// SPDX-License-Identifier: Apache-2.0
// Attention that each key collects from all query rows of a chunk of its prompt. Definition:
// triton_kernels/reference.py.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"
#include "prompt_keys.h"
#include "query_rows.h"
#include "threads.h"

namespace kvcompress {
namespace {

constexpr int64_t kBlockQueries = 32;

// The largest logit of every row and the inverse of its sum of exp(logit - largest), each
// [blocks, Hkv, rows].
struct RowStatistics {
  explicit RowStatistics(const BlockedQueries& queries)
      : num_heads(queries.num_kv_heads),
        stride(queries.stride),
        max(queries.blocks.size() * num_heads * stride),
        inverse(max.size()) {}

  int64_t at(int64_t block, int64_t head) const { return (block * num_heads + head) * stride; }

  int64_t num_heads, stride;
  std::vector<float> max, inverse;
};

template <typename T>
RowStatistics make_statistics(const BlockedQueries& queries, const PromptKeys<T>& keys) {
  RowStatistics statistics(queries);
  const TileKernels& kernels = tile_kernels();
  const int64_t num_heads = queries.num_kv_heads, num_rows = queries.stride;
  const int64_t num_items = static_cast<int64_t>(queries.blocks.size()) * num_heads;
  at::parallel_for(0, num_items, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(queries.head_size * kTileKeys);
    std::vector<float> max(num_rows * kMaxLanes), sum(max.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / num_heads, head = i % num_heads;
      const QueryBlock& block = queries.blocks[b];
      const QueryRows rows = queries.rows(b, head);
      std::fill(max.begin(), max.end(), -std::numeric_limits<float>::infinity());
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t start = 0; start < block.end(); start += kTileKeys) {
        keys.read_tile(block.request, head, start, block.end(), tile.data());
        kernels.absorb(rows, tile.data(), start, max.data(), sum.data());
      }
      const int64_t at = statistics.at(b, head);
      kernels.merge(max.data(), sum.data(), 1, queries.group * block.count, &statistics.max[at],
                    &statistics.inverse[at]);
    }
  });
  return statistics;
}

// Adds to sums [N, Hkv, length]; a tile of keys belongs to one thread, whichever rows look at it.
// Blocks [first_block[n], first_block[n + 1]) are those of request n.
template <typename T>
void add_columns(const BlockedQueries& queries, const std::vector<int64_t>& first_block,
                 const PromptKeys<T>& keys, const RowStatistics& statistics, int64_t length,
                 float* sums) {
  const TileKernels& kernels = tile_kernels();
  const int64_t num_heads = queries.num_kv_heads, num_tiles = ceil_div(length, kTileKeys);
  const int64_t num_pairs = static_cast<int64_t>(first_block.size() - 1) * num_heads;
  at::parallel_for(0, num_pairs * num_tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(queries.head_size * kTileKeys);
    std::vector<float> heads(queries.group * kTileKeys), lasts(heads.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / num_tiles, n = pair / num_heads, head = pair % num_heads;
      const int64_t first = first_block[n], last = first_block[n + 1] - 1;
      const int64_t start = i % num_tiles * kTileKeys;
      if (last < first || queries.blocks[last].end() <= start) continue;
      const int64_t stop = std::min(start + kTileKeys, queries.blocks[last].end());
      keys.read_tile(n, head, start, stop, tile.data());
      float* out = sums + pair * length + start;
      for (int64_t b = first; b <= last; ++b) {
        if (queries.blocks[b].end() <= start) continue;  // the tile lies in its future
        const int64_t at = statistics.at(b, head);
        kernels.sum(queries.rows(b, head), tile.data(), start, &statistics.max[at],
                    &statistics.inverse[at], heads.data(), lasts.data());
        for (int64_t g = 0; g < queries.group; ++g) {
          for (int64_t j = 0; j < stop - start; ++j) {
            out[j] += heads[g * kTileKeys + j] / static_cast<float>(queries.group);
          }
        }
      }
    }
  });
}

at::Tensor column_sums(const at::Tensor& queries, const at::Tensor& lengths,
                       const at::Tensor& positions, const at::Tensor& pages,
                       const at::Tensor& block_table, int64_t num_kv_heads,
                       const at::Tensor& key_index, double scale, double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [M, C, Hq, D]");
  TORCH_CHECK(lengths.scalar_type() == at::kLong && positions.scalar_type() == at::kLong,
              "lengths and positions: expected int64");
  const auto counts = lengths.contiguous(), firsts = positions.contiguous();
  const int64_t num = queries.size(0), width = queries.size(1), head_size = queries.size(3);
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  std::vector<QueryBlock> blocks;
  std::vector<int64_t> first_block{0};
  for (int64_t n = 0; n < num; ++n) {
    const int64_t count = counts.const_data_ptr<int64_t>()[n];
    const int64_t position = firsts.const_data_ptr<int64_t>()[n];
    TORCH_CHECK(count <= width && position + count <= length, "lengths: expected at most ", width,
                " rows that end by ", length, ", got ", count, " from position ", position);
    for (int64_t done = 0; done < count; done += kBlockQueries) {
      const int64_t source = (n + 1) * width - count + done;  // rows are right-aligned
      blocks.push_back({n, source, std::min(kBlockQueries, count - done), position + done});
    }
    first_block.push_back(static_cast<int64_t>(blocks.size()));
  }
  auto sums = at::zeros({num, num_kv_heads, length}, queries.options().dtype(at::kFloat));
  const BlockedQueries blocked(queries.flatten(0, 1), blocks, num_kv_heads, scale, softcap);
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "column_sums", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size);
    const RowStatistics statistics = make_statistics(blocked, keys);
    add_columns(blocked, first_block, keys, statistics, length, sums.mutable_data_ptr<float>());
  });
  return sums;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("column_sums(Tensor queries, Tensor lengths, Tensor positions, Tensor pages, "
        "Tensor block_table, int num_kv_heads, Tensor key_index, float scale, float softcap) "
        "-> Tensor", &kvcompress::column_sums);
}
