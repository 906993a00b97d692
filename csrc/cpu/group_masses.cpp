// SPDX-License-Identifier: Apache-2.0
// Attention of groups of rows that see a whole prompt. Definition:
// triton_kernels/reference_rows.py.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "elements.h"
#include "row_attention.h"

namespace kvcompress {
namespace {

// masses [Hkv, num_groups, length] of one prompt, zeros at first. queries [M, Hq, D] float32.
void add_groups(const float* queries, int64_t num_rows, int64_t group, const KeyTiles& tiles,
                int64_t num_kv_heads, int64_t head_size, int64_t prompt_len, int64_t num_groups,
                int64_t length, double scale, double softcap, float* masses) {
  const int64_t per_group = num_rows / num_groups;
  at::parallel_for(0, num_kv_heads * num_groups, 1, [&](int64_t begin, int64_t end) {
    PackedRows rows(per_group * group, head_size, scale, softcap);
    RowAttention attention(tiles);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / num_groups, first = i % num_groups * per_group;
      rows.clear();
      for (int64_t r = first; r < first + per_group; ++r) {
        for (int64_t g = 0; g < group; ++g) {
          rows.add(queries + ((r * num_kv_heads + head) * group + g) * head_size, prompt_len);
        }
      }
      attention.run(rows, head, nullptr, 1.0f / static_cast<float>(group));
      std::copy_n(attention.out.data(), prompt_len, masses + i * length);
    }
  });
}

at::Tensor group_masses(const at::Tensor& queries, const at::Tensor& pages,
                        const at::Tensor& block_table, int64_t num_kv_heads,
                        const at::Tensor& key_index, const at::Tensor& prompt_lens,
                        int64_t num_groups, double scale, double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [N, M, Hq, D]");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong, "prompt_lens: expected int64");
  const int64_t num = queries.size(0), num_rows = queries.size(1), head_size = queries.size(3);
  TORCH_CHECK(num_rows % num_groups == 0, "num_groups: expected a divisor of ", num_rows, ", got ",
              num_groups);
  const int64_t group = queries.size(2) / num_kv_heads;
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const at::Tensor source = queries.to(at::kFloat).contiguous(), lens = prompt_lens.contiguous();
  auto masses = at::zeros({num, num_kv_heads, num_groups, length}, source.options());
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "group_masses", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size);
    for (int64_t n = 0; n < num; ++n) {
      const int64_t prompt_len = lens.const_data_ptr<int64_t>()[n];
      TORCH_CHECK(0 < prompt_len && prompt_len <= length, "prompt_lens: expected 1 to ", length,
                  ", got ", prompt_len);
      std::vector<int64_t> starts;
      for (int64_t t = 0; t < prompt_len; t += kTileKeys) starts.push_back(t);
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, head_size, starts, prompt_len);
      add_groups(source.const_data_ptr<float>() + n * source.stride(0), num_rows, group, tiles,
                 num_kv_heads, head_size, prompt_len, num_groups, length, scale, softcap,
                 masses.mutable_data_ptr<float>() + n * masses.stride(0));
    }
  });
  return masses;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("group_masses(Tensor queries, Tensor pages, Tensor block_table, int num_kv_heads, "
        "Tensor key_index, Tensor prompt_lens, int num_groups, float scale, float softcap) "
        "-> Tensor", &kvcompress::group_masses);
}
