// SPDX-License-Identifier: Apache-2.0
// Attention of each prompt's last W positions on its keys. Definition: triton_kernels/reference.py.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "elements.h"
#include "row_attention.h"

namespace kvcompress {
namespace {

// One value per key from one per query head and key: the mean or the maximum. Heads are stride
// apart.
void reduce_heads(const float* heads, int64_t num_heads, int64_t stride, bool take_max,
                  int64_t count, float* out) {
  std::copy_n(heads, count, out);
  for (int64_t g = 1; g < num_heads; ++g) {
    const float* row = heads + g * stride;
    for (int64_t j = 0; j < count; ++j) {
      const float larger = row[j] <= out[j] || out[j] != out[j] ? out[j] : row[j];  // or NaN
      out[j] = take_max ? larger : out[j] + row[j];
    }
  }
  const float share = take_max ? 1.0f : 1.0f / static_cast<float>(num_heads);
  for (int64_t j = 0; j < count; ++j) out[j] *= share;
}

// The window of one row. mean, last: [Hkv, stride], of which the first prompt_len - W columns are
// written.
void score(const QueryTokens<float>& window, const KeyTiles& tiles, bool take_max, int64_t stride,
           float* mean, float* last) {
  const int64_t num_heads = window.num_kv_heads * window.group, num_keys = tiles.num_keys();
  const int64_t count = window.seen - 1;  // keys before the window
  std::vector<float> means(num_heads * num_keys), lasts(means.size());
  at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
    PackedRows rows(window.count, window.head_size, window.softcap, tiles.pairs);
    RowAttention attention(tiles);
    for (int64_t head = begin; head < end; ++head) {
      rows.start(window.scale);
      for (int64_t w = 0; w < window.count; ++w) {
        rows.add(window.queries + (w * num_heads + head) * window.head_size, window.seen + w);
      }
      attention.run(rows, head / window.group, nullptr, 1.0f / static_cast<float>(window.count));
      std::copy_n(attention.out.data(), count, &means[head * num_keys]);
      std::copy_n(attention.last.data(), count, &lasts[head * num_keys]);
    }
  });
  for (int64_t head = 0; head < window.num_kv_heads; ++head) {
    const int64_t from = head * window.group * num_keys, to = head * stride;
    reduce_heads(&means[from], window.group, num_keys, take_max, count, mean + to);
    reduce_heads(&lasts[from], window.group, num_keys, take_max, count, last + to);
  }
}

std::tuple<at::Tensor, at::Tensor> window_scores(const at::Tensor& queries, const at::Tensor& pages,
                                                 const at::Tensor& block_table,
                                                 int64_t num_kv_heads, const at::Tensor& key_index,
                                                 const at::Tensor& prompt_lens,
                                                 const at::Tensor& scale, double softcap,
                                                 bool take_max) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [R, W, Hq, D]");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong, "prompt_lens: expected int64");
  const at::Tensor lens = prompt_lens.contiguous();
  const at::Tensor scales = row_scales(scale, queries.size(0));
  const int64_t num = queries.size(0), window = queries.size(1), head_size = queries.size(3);
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const int64_t* prompt_len = lens.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < num; ++n) {
    TORCH_CHECK(window <= prompt_len[n] && prompt_len[n] <= length, "prompt_lens: expected ",
                window, " to ", length, ", got ", prompt_len[n]);
  }
  auto mean = at::zeros({num, num_kv_heads, length}, queries.options().dtype(at::kFloat));
  auto last = at::zeros(mean.sizes(), mean.options());
  const at::Tensor source = queries.to(at::kFloat).contiguous();
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "window_scores", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size,
                                    in_pairs(queries, pages));
    for (int64_t n = 0; n < num; ++n) {
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, prompt_len[n]);
      const QueryTokens<float> rows{source.const_data_ptr<float>() + n * source.stride(0), window,
                             num_kv_heads, queries.size(2) / num_kv_heads, head_size,
                             prompt_len[n] - window + 1, 1, scales.const_data_ptr<float>()[n],
                             softcap};
      score(rows, tiles, take_max, length, mean.mutable_data_ptr<float>() + n * mean.stride(0),
            last.mutable_data_ptr<float>() + n * last.stride(0));
    }
  });
  return {mean, last};
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("window_scores(Tensor queries, Tensor pages, Tensor block_table, int num_kv_heads, "
        "Tensor key_index, Tensor prompt_lens, Tensor scale, float softcap, bool take_max) "
        "-> (Tensor, Tensor)", &kvcompress::window_scores);
}
