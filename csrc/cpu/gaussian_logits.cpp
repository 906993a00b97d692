// SPDX-License-Identifier: Apache-2.0
// Logits that Gaussian queries would pay. Definition: triton_kernels/reference_paged.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"
#include "prompt_keys.h"
#include "query_rows.h"

namespace kvcompress {
namespace {

constexpr int64_t kChunkKeys = 8 * kTileKeys;

at::Tensor gaussian_logits(const at::Tensor& mean, const at::Tensor& covariance,
                           const at::Tensor& pages, const at::Tensor& block_table,
                           int64_t num_kv_heads, const at::Tensor& key_index,
                           const at::Tensor& scale) {
  TORCH_CHECK(mean.dim() == 3, "mean: expected [R, Hq, D]");
  TORCH_CHECK(covariance.dim() == 4 && covariance.sizes().slice(0, 3) == mean.sizes() &&
                  covariance.size(3) == mean.size(2),
              "covariance: expected [R, Hq, D, D]");
  const int64_t num = mean.size(0), num_heads = mean.size(1), head_size = mean.size(2);
  const int64_t group = num_heads / num_kv_heads;
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const int64_t num_chunks = ceil_div(length, kChunkKeys);
  // k^T (A k + b) with A = scale^2 / 2 * covariance and b = scale * mean
  const at::Tensor factor = row_scales(scale, num).view({num, 1, 1});
  const at::Tensor linear = (mean.to(at::kFloat) * factor).contiguous();
  const at::Tensor square =
      (covariance.to(at::kFloat) * (factor * factor * 0.5f).unsqueeze(3)).contiguous();
  auto result = at::empty({num, num_heads, length}, linear.options());
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "gaussian_logits", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size);
    at::parallel_for(0, num * num_kv_heads * num_chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> tile(head_size * kTileKeys), sums(kTileKeys);
      std::vector<PackedRows> rows(group, PackedRows(head_size, head_size, 0.0));
      for (int64_t i = begin, packed = -1; i < end; ++i) {
        const int64_t pair = i / num_chunks, head = pair * group;  // a row's first query head
        for (int64_t g = 0; g < group && pair != packed; ++g) {
          rows[g].start(1.0f);
          for (int64_t d = 0; d < head_size; ++d) {
            const int64_t from = ((head + g) * head_size + d) * head_size;
            rows[g].add(square.const_data_ptr<float>() + from, 0);
          }
        }
        packed = pair;
        const int64_t first = i % num_chunks * kChunkKeys;
        const int64_t stop = std::min(first + kChunkKeys, length);
        for (int64_t start = first; start < stop; start += kTileKeys) {
          keys.read_tile(pair / num_kv_heads, pair % num_kv_heads, start, stop, tile.data());
          for (int64_t g = 0; g < group; ++g) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            tile_kernels().quadratic(rows[g].rows(0, head_size),
                                     linear.const_data_ptr<float>() + (head + g) * head_size,
                                     tile.data(), sums.data());
            std::copy_n(sums.data(), std::min(kTileKeys, stop - start),
                        result.mutable_data_ptr<float>() + (head + g) * length + start);
          }
        }
      }
    });
  });
  return result;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("gaussian_logits(Tensor mean, Tensor covariance, Tensor pages, Tensor block_table, "
        "int num_kv_heads, Tensor key_index, Tensor scale) -> Tensor",
        &kvcompress::gaussian_logits);
}
