// SPDX-License-Identifier: Apache-2.0
// Attention that each key collects from all query rows of a chunk of its prompt. Definition:
// triton_kernels/reference.py.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "elements.h"
#include "row_attention.h"
#include "threads.h"

namespace kvcompress {
namespace {

// Into how many strips the rows of a KV head are cut, whatever the number of threads: sums over
// strips are added up in the same order everywhere.
constexpr int64_t kStrips = 16;

// Adds to sums [Hkv, length].
template <typename T>
void add_columns(const QueryTokens<T>& chunk, const KeyTiles& tiles, int64_t num_keys, int64_t length,
                 float* sums) {
  std::vector<float> partial(chunk.num_kv_heads * kStrips * num_keys);
  attend_parts(chunk, tiles, ceil_div(chunk.count, kStrips), kStrips, num_keys, num_keys,
               partial.data());
  const int64_t grain = grain_of(kStrips * num_keys);
  at::parallel_for(0, chunk.num_kv_heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kStrips; i < end * kStrips; ++i) {
      float* out = sums + i / kStrips * length;
      for (int64_t j = 0; j < num_keys; ++j) out[j] += partial[i * num_keys + j];
    }
  });
}

at::Tensor key_attention_sum(const at::Tensor& queries, const at::Tensor& lengths,
                       const at::Tensor& positions, const at::Tensor& pages,
                       const at::Tensor& block_table, int64_t num_kv_heads,
                       const at::Tensor& key_index, const at::Tensor& scale, double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [M, C, Hq, D]");
  TORCH_CHECK(lengths.scalar_type() == at::kLong && positions.scalar_type() == at::kLong,
              "lengths and positions: expected int64");
  const auto counts = lengths.contiguous(), firsts = positions.contiguous();
  const auto scales = row_scales(scale, queries.size(0));
  const bool pairs = in_pairs(queries, pages);
  const auto source = queries.to(pairs ? at::kBFloat16 : at::kFloat).contiguous();
  const int64_t num = queries.size(0), width = queries.size(1), head_size = queries.size(3);
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  auto sums = at::zeros({num, num_kv_heads, length}, source.options().dtype(at::kFloat));
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "key_attention_sum", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size,
                                    pairs);
    for (int64_t n = 0; n < num; ++n) {
      const int64_t count = counts.const_data_ptr<int64_t>()[n];
      const int64_t position = firsts.const_data_ptr<int64_t>()[n], seen = position + count;
      TORCH_CHECK(count <= width && seen <= length, "lengths: expected at most ", width,
                  " rows that end by ", length, ", got ", count, " from position ", position);
      if (count == 0) continue;
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, seen);
      // rows are right-aligned
      const auto add = [&](const auto* first) {
        const QueryTokens chunk{
            first + ((n + 1) * width - count) * source.stride(1), count, num_kv_heads,
            queries.size(2) / num_kv_heads, head_size, position + 1, 1,
            scales.const_data_ptr<float>()[n], softcap};
        add_columns(chunk, tiles, seen, length,
                    sums.mutable_data_ptr<float>() + n * sums.stride(0));
      };
      pairs ? add(source.const_data_ptr<c10::BFloat16>()) : add(source.const_data_ptr<float>());
    }
  });
  return sums;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("key_attention_sum(Tensor queries, Tensor lengths, Tensor positions, Tensor pages, "
        "Tensor block_table, int num_kv_heads, Tensor key_index, Tensor scale, float softcap) "
        "-> Tensor", &kvcompress::key_attention_sum);
}
