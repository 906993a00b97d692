// SPDX-License-Identifier: Apache-2.0
// Keys that rows of an instruction look at almost as much as at their favourite. Definition:
// triton_kernels/reference_rows.py.

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "elements.h"
#include "row_attention.h"

namespace kvcompress {
namespace {

// Tokens whose rows, of all query heads of a KV head, have their logits in memory together.
constexpr int64_t kTokens = 4;

// Rows of one KV head: how many of the keys that a row sees have a logit of at least its largest
// plus least.
void count_strong(const QueryRows& rows, const KeyTiles& tiles, int64_t head, float least,
                  std::vector<float>& logits, int32_t* counts) {
  const int64_t num_keys = tiles.num_keys();
  logits.resize(rows.num_blocks * kRowBlock * num_keys);
  const float* tile = tiles.head(head);
  for (size_t i = 0; i < tiles.starts.size(); ++i, tile += tiles.tile_size) {
    tile_kernels().logits(rows, tile, tiles.starts[i], &logits[i * kTileKeys], num_keys,
                          nullptr);
  }
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const float* row = &logits[r * num_keys];
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < rows.num_keys[r]; ++j) top = std::max(top, row[j]);
    const float bound = top + least;
    int32_t count = 0;
    for (int64_t j = 0; j < rows.num_keys[r]; ++j) count += row[j] >= bound;
    counts[r] = count;
  }
}

at::Tensor strong_key_counts(const at::Tensor& queries, const at::Tensor& pages,
                             const at::Tensor& block_table, int64_t num_kv_heads,
                             const at::Tensor& key_index, const at::Tensor& prompt_lens,
                             const at::Tensor& instruction_len, const at::Tensor& scale,
                             double softcap, double least) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [R, Q, Hq, D]");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong && instruction_len.scalar_type() == at::kLong,
              "prompt_lens and instruction_len: expected int64");
  const int64_t num = queries.size(0), num_rows = queries.size(1), num_q_heads = queries.size(2);
  const int64_t head_size = queries.size(3), group = num_q_heads / num_kv_heads;
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const at::Tensor source = queries.to(at::kFloat).contiguous();
  const at::Tensor lens = prompt_lens.contiguous(), texts = instruction_len.contiguous();
  const at::Tensor scales = row_scales(scale, num);
  auto counts = at::zeros({num, num_q_heads, num_rows}, source.options().dtype(at::kInt));
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "strong_key_counts", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size,
                                    in_pairs(queries, pages));
    for (int64_t n = 0; n < num; ++n) {
      const int64_t prompt_len = lens.const_data_ptr<int64_t>()[n];
      const int64_t text = texts.const_data_ptr<int64_t>()[n];
      TORCH_CHECK(prompt_len <= length, "prompt_lens: expected at most ", length, ", got ",
                  prompt_len);
      TORCH_CHECK(0 <= text && text <= std::min(num_rows, prompt_len),
                  "instruction_len: expected at most ", std::min(num_rows, prompt_len), ", got ",
                  text);
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, prompt_len);
      const int64_t parts = ceil_div(text, kTokens);
      at::parallel_for(0, num_kv_heads * parts, 1, [&](int64_t begin, int64_t end) {
        PackedRows rows(kTokens * group, head_size, softcap, tiles.pairs);
        std::vector<float> logits;
        std::vector<int32_t> found(kTokens * group);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t head = i / parts, first = num_rows - text + i % parts * kTokens;
          const int64_t stop = std::min(first + kTokens, num_rows);
          rows.start(scales.const_data_ptr<float>()[n]);
          for (int64_t r = first; r < stop; ++r) {
            for (int64_t g = 0; g < group; ++g) {
              rows.add(source.const_data_ptr<float>() +
                           ((n * num_rows + r) * num_q_heads + head * group + g) * head_size,
                       prompt_len - num_rows + r + 1);
            }
          }
          count_strong(rows.rows(0, rows.size()), tiles, head, static_cast<float>(least), logits,
                       found.data());
          int32_t* out = counts.mutable_data_ptr<int32_t>() + n * counts.stride(0);
          for (int64_t r = first; r < stop; ++r) {
            for (int64_t g = 0; g < group; ++g) {
              out[(head * group + g) * num_rows + r] = found[(r - first) * group + g];
            }
          }
        }
      });
    }
  });
  return counts;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("strong_key_counts(Tensor queries, Tensor pages, Tensor block_table, int num_kv_heads, "
        "Tensor key_index, Tensor prompt_lens, Tensor instruction_len, Tensor scale, "
        "float softcap, float least) -> Tensor", &kvcompress::strong_key_counts);
}
