// SPDX-License-Identifier: Apache-2.0
// Reading and compacting head pages of vLLM's CPU cache. Definitions: triton_kernels/reference.py.
//
// A page keeps block_size tokens of one KV head, keys and values each in an order that depends on the
// instruction set; the index tables say where element (token, d) stands.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <initializer_list>

#include "elements.h"

namespace {

// One part (keys or values) of whole prompts, in token order and times a scale, as float32: [N, Hkv,
// B * block_size, D].
at::Tensor read_prompt(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
                       const at::Tensor& index, int64_t head_size, double scale) {
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
  TORCH_CHECK(block_table.scalar_type() == at::kLong && index.scalar_type() == at::kLong,
              "block_table and index: expected int64");
  const auto table = block_table.contiguous();
  const int64_t num_blocks = table.size(1), page_elems = pages.size(1), part = index.numel();
  const int64_t num_pages = table.size(0) * num_kv_heads * num_blocks;
  auto out = at::empty({table.size(0), num_kv_heads, num_blocks * (part / head_size), head_size},
                       pages.options().dtype(at::kFloat));
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* where = index.const_data_ptr<int64_t>();
  float* target = out.mutable_data_ptr<float>();
  const float factor = static_cast<float>(scale);
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "read_prompt", [&] {
    const scalar_t* source = pages.const_data_ptr<scalar_t>();
    const kvcompress::ToFloat<scalar_t> to_float;
    at::parallel_for(0, num_pages, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / (num_kv_heads * num_blocks);
        const int64_t head = i / num_blocks % num_kv_heads;
        const int64_t block = blocks[row * num_blocks + i % num_blocks];
        const scalar_t* page = source + (block * num_kv_heads + head) * page_elems;
        float* tokens = target + i * part;
        for (int64_t e = 0; e < part; ++e) tokens[e] = to_float(page[where[e]]) * factor;
      }
    });
  });
  return out;
}

// Runs f<T> on pages reinterpreted by element size: elements move as they are, whatever their type.
template <typename F>
void by_element_size(const at::Tensor& pages, F&& f) {
  switch (pages.element_size()) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: TORCH_CHECK(false, "pages: expected elements of 1, 2 or 4 bytes");
  }
}

void check_long(std::initializer_list<at::Tensor> tensors) {
  for (const auto& t : tensors) {
    TORCH_CHECK(t.scalar_type() == at::kLong, "tables and counts: expected int64");
  }
}

// Kept tokens of every head out of their pages: [N, Hkv, K, 2 * D], keys then values of a token.
at::Tensor stage_tokens(const at::Tensor& pages, const at::Tensor& block_table,
                        const at::Tensor& kept, const at::Tensor& count,
                        const at::Tensor& key_index, const at::Tensor& value_index,
                        int64_t block_size, int64_t head_size) {
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
  const auto table = block_table.contiguous(), positions = kept.contiguous();
  const auto counts = count.contiguous();
  check_long({table, positions, counts, key_index, value_index});
  const int64_t num_heads = positions.size(1), max_kept = positions.size(2);
  auto staged = at::empty({positions.size(0), num_heads, max_kept, 2 * head_size}, pages.options());
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* where = positions.const_data_ptr<int64_t>();
  const int64_t* used = counts.const_data_ptr<int64_t>();
  const int64_t* keys = key_index.const_data_ptr<int64_t>();
  const int64_t* values = value_index.const_data_ptr<int64_t>();
  by_element_size(pages, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(pages.const_data_ptr());
    T* target = static_cast<T*>(staged.mutable_data_ptr());
    at::parallel_for(0, positions.size(0) * num_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t* row_blocks = blocks + i / num_heads * table.size(1);
        for (int64_t k = 0; k < used[i]; ++k) {
          const int64_t position = where[i * max_kept + k];
          const int64_t token = position % block_size * head_size;
          const int64_t page = row_blocks[position / block_size] * num_heads + i % num_heads;
          const T* from = source + page * pages.size(1);
          T* row = target + (i * max_kept + k) * 2 * head_size;
          for (int64_t d = 0; d < head_size; ++d) row[d] = from[keys[token + d]];
          for (int64_t d = 0; d < head_size; ++d) row[head_size + d] = from[values[token + d]];
        }
      }
    });
  });
  return staged;
}

// Staged tokens into the head pages of the kept blocks, in place.
void write_pages(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
                 const at::Tensor& staged,
                 const at::Tensor& page_count, const at::Tensor& page_start,
                 const at::Tensor& num_full_blocks, const at::Tensor& num_kept_blocks,
                 const at::Tensor& key_index, const at::Tensor& value_index, int64_t block_size,
                 int64_t head_size, int64_t layer_pages) {
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
  TORCH_CHECK(staged.scalar_type() == pages.scalar_type(), "staged: expected the pages' type");
  const auto table = block_table.contiguous(), rows = staged.contiguous();
  const auto counts = page_count.contiguous(), starts = page_start.contiguous();
  const auto full = num_full_blocks.contiguous(), kept = num_kept_blocks.contiguous();
  check_long({table, counts, starts, full, kept, key_index, value_index});
  const int64_t num_runs = rows.size(1), max_kept = rows.size(2);
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t* keys = key_index.const_data_ptr<int64_t>();
  const int64_t* values = value_index.const_data_ptr<int64_t>();
  by_element_size(pages, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(rows.const_data_ptr());
    T* target = static_cast<T*>(pages.data_ptr());
    at::parallel_for(0, rows.size(0) * num_runs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t request = i / num_runs;
        const int64_t n = kept.const_data_ptr<int64_t>()[request];
        const int64_t first = full.const_data_ptr<int64_t>()[request] - n;
        for (int64_t p = 0; p < count[i]; ++p) {
          const int64_t number = start[i] + p, within = number % (n * num_kv_heads);
          const int64_t block = blocks[request * table.size(1) + first + within % n];
          const int64_t page =
              number / (n * num_kv_heads) * layer_pages + block * num_kv_heads + within / n;
          T* to = target + page * pages.size(1);
          const T* from = source + (i * max_kept + p * block_size) * 2 * head_size;
          for (int64_t t = 0; t < block_size; ++t, from += 2 * head_size) {
            const int64_t token = t * head_size;
            for (int64_t d = 0; d < head_size; ++d) to[keys[token + d]] = from[d];
            for (int64_t d = 0; d < head_size; ++d) to[values[token + d]] = from[head_size + d];
          }
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(vllm_kvcompress, m) {
  m.def("read_prompt(Tensor pages, Tensor block_table, int num_kv_heads, Tensor index, "
        "int head_size, float scale) -> Tensor", &read_prompt);
  m.def("stage_tokens(Tensor pages, Tensor block_table, Tensor kept, Tensor count, "
        "Tensor key_index, Tensor value_index, int block_size, int head_size) -> Tensor",
        &stage_tokens);
  m.def("write_pages(Tensor(a!) pages, Tensor block_table, int num_kv_heads, Tensor staged, "
        "Tensor page_count, Tensor page_start, Tensor num_full_blocks, Tensor num_kept_blocks, Tensor key_index, "
        "Tensor value_index, int block_size, int head_size, int layer_pages) -> ()", &write_pages);
}
