// SPDX-License-Identifier: Apache-2.0
// Attention of groups of rows that see a whole prompt. Definition:
// triton_kernels/reference_rows.py.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "elements.h"
#include "row_attention.h"

namespace kvcompress {
namespace {

at::Tensor group_attention_sum(const at::Tensor& queries, const at::Tensor& pages,
                        const at::Tensor& block_table, int64_t num_kv_heads,
                        const at::Tensor& key_index, const at::Tensor& prompt_lens,
                        int64_t num_groups, const at::Tensor& scale,
                        double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [R, M, Hq, D]");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong, "prompt_lens: expected int64");
  const int64_t num = queries.size(0), num_rows = queries.size(1), head_size = queries.size(3);
  TORCH_CHECK(num_rows % num_groups == 0, "num_groups: expected a divisor of ", num_rows, ", got ",
              num_groups);
  const int64_t group = queries.size(2) / num_kv_heads;
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const bool pairs = in_pairs(queries, pages);
  const at::Tensor source = queries.to(pairs ? at::kBFloat16 : at::kFloat).contiguous();
  const at::Tensor lens = prompt_lens.contiguous();
  const at::Tensor scales = row_scales(scale, num);
  auto masses = at::zeros({num, num_kv_heads, num_groups, length}, source.options().dtype(at::kFloat));
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "group_attention_sum", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size,
                                    pairs);
    for (int64_t n = 0; n < num; ++n) {
      const int64_t prompt_len = lens.const_data_ptr<int64_t>()[n];
      TORCH_CHECK(0 < prompt_len && prompt_len <= length, "prompt_lens: expected 1 to ", length,
                  ", got ", prompt_len);
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, prompt_len);
      const auto attend = [&](const auto* first) {
        const QueryTokens rows{first + n * source.stride(0), num_rows, num_kv_heads, group,
                               head_size, prompt_len, 0, scales.const_data_ptr<float>()[n],
                               softcap};
        attend_parts(rows, tiles, num_rows / num_groups, num_groups, prompt_len, length,
                     masses.mutable_data_ptr<float>() + n * masses.stride(0));
      };
      pairs ? attend(source.const_data_ptr<c10::BFloat16>())
            : attend(source.const_data_ptr<float>());
    }
  });
  return masses;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("group_attention_sum(Tensor queries, Tensor pages, Tensor block_table, int num_kv_heads, "
        "Tensor key_index, Tensor prompt_lens, int num_groups, Tensor scale, float softcap) "
        "-> Tensor", &kvcompress::group_attention_sum);
}
