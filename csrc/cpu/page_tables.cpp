// SPDX-License-Identifier: Apache-2.0
// Page tables of a decode step. Definition: triton_kernels/reference_decode.py.

#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cstdint>

#include "threads.h"

namespace kvcompress {
namespace {

void head_page_tables(const at::Tensor& table, const at::Tensor& kv_len,
                      const at::Tensor& block_table, const at::Tensor& seq_lens,
                      const at::Tensor& slots, const at::Tensor& num_full_blocks,
                      const at::Tensor& num_kept_blocks, const at::Tensor& page_count,
                      const at::Tensor& page_start, int64_t first_layer, int64_t layer_pages,
                      int64_t block_size) {
  for (const auto& t : {table, kv_len, block_table, seq_lens, num_full_blocks, num_kept_blocks,
                        page_count, page_start}) {
    TORCH_CHECK(t.scalar_type() == at::kInt, "tables and counts: expected int32");
  }
  for (const auto& t : {table, kv_len, page_count, page_start}) {
    TORCH_CHECK(t.is_contiguous(), "table, kv_len and pages: expected contiguous");
  }
  const auto of_row = slots.contiguous(), lengths = seq_lens.contiguous();
  const auto full = num_full_blocks.contiguous(), kept = num_kept_blocks.contiguous();
  const auto blocks = block_table.contiguous();
  const int64_t num_slots = page_count.size(1), num_heads = page_count.size(2);
  const int64_t num_rows = of_row.size(0), width = table.size(2), num_blocks = blocks.size(1);
  const int64_t* slot_of = of_row.const_data_ptr<int64_t>();
  const int32_t* block_ids = blocks.const_data_ptr<int32_t>();
  const int32_t* seq_len = lengths.const_data_ptr<int32_t>();
  const int32_t* num_full = full.const_data_ptr<int32_t>();
  const int32_t* num_kept = kept.const_data_ptr<int32_t>();
  const int32_t* counts = page_count.const_data_ptr<int32_t>();
  const int32_t* starts = page_start.const_data_ptr<int32_t>();
  int32_t* ids = table.mutable_data_ptr<int32_t>();
  int32_t* held = kv_len.mutable_data_ptr<int32_t>();
  const int64_t num_runs = page_count.size(0) * num_rows * num_heads;
  at::parallel_for(0, num_runs, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / (num_rows * num_heads), row = i / num_heads % num_rows;
      const int64_t head = i % num_heads, slot = slot_of[row];
      const int64_t state = (layer * num_slots + slot) * num_heads + head;
      const int64_t m = num_full[slot], n = num_kept[slot], count = counts[state];
      const int64_t length = std::max<int64_t>(seq_len[row] + (count - m) * block_size, 0);
      const int64_t used = std::min((length + block_size - 1) / block_size, width);
      const int32_t* row_blocks = block_ids + row * num_blocks;
      int32_t* out = ids + i * width;
      held[i] = static_cast<int32_t>(length);
      const auto block = [&](int64_t index) -> int64_t {
        return row_blocks[std::clamp<int64_t>(index, 0, num_blocks - 1)];
      };
      const int64_t compacted = std::min(count, used);
      for (int64_t p = 0; p < compacted; ++p) {
        const int64_t number = starts[state] + p, within = number % (n * num_heads);
        out[p] = static_cast<int32_t>(number / (n * num_heads) * layer_pages +
                                      block(m - n + within % n) * num_heads + within / n);
      }
      const int64_t base = (first_layer + layer) * layer_pages + head;
      for (int64_t p = compacted; p < used; ++p) {
        out[p] = static_cast<int32_t>(base + block(m + p - count) * num_heads);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("head_page_tables(Tensor(a!) table, Tensor(b!) kv_len, Tensor block_table, "
        "Tensor seq_lens, Tensor slots, Tensor num_full_blocks, Tensor num_kept_blocks, "
        "Tensor page_count, Tensor page_start, int first_layer, int layer_pages, "
        "int block_size) -> ()", &head_page_tables);
}

}  // namespace kvcompress
