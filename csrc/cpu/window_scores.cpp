// SPDX-License-Identifier: Apache-2.0
// Attention of each prompt's last W positions on its keys. Definition: triton_kernels/reference.py.
//
// The keys of a head are read twice, in tiles: once for the softmax statistics of each row, once
// for the probabilities. Chunks of a head's tiles are independent of each other in both passes.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "attention_tiles.h"
#include "elements.h"
#include "prompt_keys.h"
#include "query_rows.h"
#include "threads.h"

namespace kvcompress {
namespace {

constexpr int64_t kChunkKeys = 8 * kTileKeys;

// One value per key from one per query head and key: the mean or the maximum, times a factor.
void reduce_heads(const float* heads, int64_t num_heads, float factor, bool take_max, int64_t count,
                  float* out) {
  std::copy_n(heads, count, out);
  for (int64_t g = 1; g < num_heads; ++g) {
    const float* row = heads + g * kTileKeys;
    for (int64_t j = 0; j < count; ++j) {
      const float larger = row[j] <= out[j] || out[j] != out[j] ? out[j] : row[j];  // or NaN
      out[j] = take_max ? larger : out[j] + row[j];
    }
  }
  const float share = take_max ? factor : factor / static_cast<float>(num_heads);
  for (int64_t j = 0; j < count; ++j) out[j] *= share;
}

// The windows of R rows, scaled: those of all query heads of a KV head together.
struct Windows {
  // queries: [R, W, Hq, D] float32; lens, scales: [R]
  Windows(const at::Tensor& queries, const int64_t* lens, int64_t num_kv_heads,
          const float* scales, double softcap)
      : size(queries.size(1)),
        num_heads(num_kv_heads),
        group(queries.size(2) / num_kv_heads),
        head_size(queries.size(3)),
        prompt_lens(lens, lens + queries.size(0)) {
    const float* from = queries.const_data_ptr<float>();
    for (int64_t pair = 0; pair < queries.size(0) * num_heads; ++pair) {
      const int64_t n = pair / num_heads, head = pair % num_heads;
      PackedRows& window = rows.emplace_back(group * size, head_size, softcap);
      window.start(scales[n]);
      for (int64_t g = 0; g < group; ++g) {
        for (int64_t w = 0; w < size; ++w) {
          const int64_t row = ((n * size + w) * num_heads + head) * group + g;
          window.add(from + row * head_size, prompt_lens[n] - size + w + 1);
        }
      }
    }
  }

  int64_t size, num_heads, group, head_size;  // W, Hkv, G, D
  std::vector<int64_t> prompt_lens;
  std::vector<PackedRows> rows;  // [R, Hkv]
};

// mean, last: [R, Hkv, length], zeros at first.
template <typename T>
void score(const Windows& queries, const PromptKeys<T>& keys, int64_t length, bool take_max,
           float* mean, float* last) {
  const TileKernels& kernels = tile_kernels();
  const int64_t num_heads = queries.num_heads;
  const int64_t num_rows = ceil_div(queries.group * queries.size, kRowBlock) * kRowBlock;
  const int64_t num_pairs = static_cast<int64_t>(queries.rows.size());
  const int64_t max_chunks = ceil_div(length, kChunkKeys), stride = num_rows * kMaxLanes;
  const int64_t num_items = num_pairs * max_chunks;
  std::vector<float> max(num_items * stride, -std::numeric_limits<float>::infinity());
  std::vector<float> sum(num_items * stride, 0.0f);

  at::parallel_for(0, num_items, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(queries.head_size * kTileKeys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / max_chunks, head = pair % num_heads, n = pair / num_heads;
      const QueryRows rows = queries.rows[pair].heads(queries.group);
      const int64_t first = i % max_chunks * kChunkKeys;
      const int64_t stop = std::min(first + kChunkKeys, queries.prompt_lens[n]);
      for (int64_t start = first; start < stop; start += kTileKeys) {
        keys.read_tile(n, head, start, stop, tile.data());
        kernels.absorb(rows, tile.data(), start, &max[i * stride], &sum[i * stride]);
      }
    }
  });

  std::vector<float> row_max(num_pairs * num_rows), row_inverse(row_max.size());
  at::parallel_for(0, num_pairs, grain_of(max_chunks * stride), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i * max_chunks * stride, to = i * num_rows;
      kernels.merge(&max[from], &sum[from], max_chunks, num_rows, &row_max[to], &row_inverse[to]);
    }
  });

  at::parallel_for(0, num_items, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(queries.head_size * kTileKeys);
    std::vector<float> sums(queries.group * kTileKeys), lasts(sums.size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / max_chunks, head = pair % num_heads, n = pair / num_heads;
      const QueryRows rows = queries.rows[pair].heads(queries.group);
      const float per_row = 1.0f / static_cast<float>(rows.rows_per_head);
      const int64_t first = i % max_chunks * kChunkKeys;
      const int64_t stop = std::min(first + kChunkKeys, queries.prompt_lens[n] - queries.size);
      for (int64_t start = first; start < stop; start += kTileKeys) {
        keys.read_tile(n, head, start, stop, tile.data());
        kernels.sum(rows, tile.data(), start, &row_max[pair * num_rows],
                    &row_inverse[pair * num_rows], sums.data(), lasts.data());
        const int64_t count = std::min(stop - start, kTileKeys), at = pair * length + start;
        reduce_heads(sums.data(), queries.group, per_row, take_max, count, mean + at);
        reduce_heads(lasts.data(), queries.group, 1.0f, take_max, count, last + at);
      }
    }
  });
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
  const Windows windows(queries.to(at::kFloat).contiguous(), prompt_len, num_kv_heads,
                        scales.const_data_ptr<float>(), softcap);
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "window_scores", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size);
    score(windows, keys, length, take_max, mean.mutable_data_ptr<float>(),
          last.mutable_data_ptr<float>());
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
