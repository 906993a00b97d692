// SPDX-License-Identifier: Apache-2.0
// How much of a layer's output each value makes. Definition: triton_kernels/reference_paged.py.

#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"
#include "prompt_keys.h"
#include "query_rows.h"

namespace kvcompress {
namespace {

constexpr int64_t kChunkKeys = 8 * kTileKeys;

at::Tensor output_norms(const at::Tensor& pages, const at::Tensor& block_table,
                        int64_t num_kv_heads, const at::Tensor& value_index,
                        const at::Tensor& grams, const std::optional<at::Tensor>& value_scale) {
  TORCH_CHECK(grams.dim() == 4 && grams.scalar_type() == at::kFloat &&
                  grams.size(2) == grams.size(3) && grams.size(1) % num_kv_heads == 0,
              "grams: expected float32 [L, Hq, D, D]");
  const int64_t num = block_table.size(0), num_heads = grams.size(1), head_size = grams.size(2);
  TORCH_CHECK(grams.size(0) > 0 && num % grams.size(0) == 0, "grams: expected those of the rows");
  const int64_t prompts = num / grams.size(0), group = num_heads / num_kv_heads;
  const int64_t length = block_table.size(1) * (value_index.numel() / head_size);
  const int64_t num_chunks = ceil_div(length, kChunkKeys);
  const at::Tensor squares = grams.contiguous();
  const at::Tensor scales = value_scale ? row_scales(*value_scale, num) : at::Tensor();
  const std::vector<float> nothing(head_size);
  auto norms = at::zeros({num, num_kv_heads, length}, squares.options());
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "output_norms", [&] {
    const PromptKeys<scalar_t> values(pages, block_table, num_kv_heads, value_index, head_size);
    at::parallel_for(0, num * num_kv_heads * num_chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> tile(head_size * kTileKeys), sums(kTileKeys);
      std::vector<PackedRows> rows(group, PackedRows(head_size, head_size, 0.0));
      for (int64_t i = begin, packed = -1; i < end; ++i) {
        const int64_t pair = i / num_chunks, row = pair / num_kv_heads;
        const int64_t head = (row / prompts) * num_heads + pair % num_kv_heads * group;
        for (int64_t g = 0; g < group && pair != packed; ++g) {
          rows[g].start(1.0f);
          for (int64_t d = 0; d < head_size; ++d) {
            const int64_t from = ((head + g) * head_size + d) * head_size;
            rows[g].add(squares.const_data_ptr<float>() + from, 0);
          }
        }
        packed = pair;
        const float scale = value_scale ? scales.const_data_ptr<float>()[row] : 1.0f;
        const float share = scale / static_cast<float>(group);
        const int64_t first = i % num_chunks * kChunkKeys;
        const int64_t stop = std::min(first + kChunkKeys, length);
        for (int64_t start = first; start < stop; start += kTileKeys) {
          values.read_tile(row, pair % num_kv_heads, start, stop, tile.data());
          float* out = norms.mutable_data_ptr<float>() + pair * length + start;
          for (int64_t g = 0; g < group; ++g) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            tile_kernels().quadratic(rows[g].rows(0, head_size), nothing.data(), tile.data(),
                                     sums.data());
            for (int64_t j = 0; j < std::min(kTileKeys, stop - start); ++j) {
              out[j] += share * std::sqrt(std::max(sums[j], 0.0f));
            }
          }
        }
      }
    });
  });
  return norms;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("output_norms(Tensor pages, Tensor block_table, int num_kv_heads, Tensor value_index, "
        "Tensor grams, Tensor? value_scale) -> Tensor",
        &kvcompress::output_norms);
}
