// SPDX-License-Identifier: Apache-2.0
// Reading and compacting head pages of vLLM's CPU cache. Definitions: triton_kernels/reference.py.
//
// A page keeps block_size tokens of one KV head, keys and values each in an order that depends on
// the instruction set; the index tables say where element (token, d) stands.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <initializer_list>
#include <optional>

#include "elements.h"
#include "query_rows.h"

namespace {

// One part (keys or values) of whole prompts, in token order and times a scale per row, as float32:
// [R, Hkv, B * block_size, D].
at::Tensor read_prompt(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
                       const at::Tensor& index, int64_t head_size,
                       const std::optional<at::Tensor>& scale) {
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
  TORCH_CHECK(block_table.scalar_type() == at::kLong && index.scalar_type() == at::kLong,
              "block_table and index: expected int64");
  const auto table = block_table.contiguous();
  const auto scales = kvcompress::row_scales(
      scale.value_or(at::ones({table.size(0)}, table.options().dtype(at::kFloat))), table.size(0));
  const int64_t num_blocks = table.size(1), page_elems = pages.size(1), part = index.numel();
  const int64_t num_pages = table.size(0) * num_kv_heads * num_blocks;
  auto out = at::empty({table.size(0), num_kv_heads, num_blocks * (part / head_size), head_size},
                       pages.options().dtype(at::kFloat));
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* where = index.const_data_ptr<int64_t>();
  float* target = out.mutable_data_ptr<float>();
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "read_prompt", [&] {
    const scalar_t* source = pages.const_data_ptr<scalar_t>();
    const kvcompress::ToFloat<scalar_t> to_float;
    at::parallel_for(0, num_pages, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / (num_kv_heads * num_blocks);
        const int64_t head = i / num_blocks % num_kv_heads;
        const int64_t block = blocks[row * num_blocks + i % num_blocks];
        const scalar_t* page = source + (block * num_kv_heads + head) * page_elems;
        const float factor = scales.const_data_ptr<float>()[row];
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

void check_staged(const at::Tensor& pages, const at::Tensor& staged, int64_t block_size,
                  int64_t head_size) {
  const int64_t width = block_size * 2 * head_size;
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous() && pages.size(1) == width,
              "pages: expected contiguous [P, ", width, "]");
  TORCH_CHECK(staged.dim() == 3 && staged.is_contiguous() && staged.size(2) == width &&
                  staged.scalar_type() == pages.scalar_type(),
              "staged: expected contiguous [N, pages, ", width, "] of the pages' type");
}

// Kept tokens of every head out of their pages, keys then values of a token, into the head's pages
// of staged [N, pages, block_size * 2 * D]. Rows are layers of N prompts.
void stage_tokens(const at::Tensor& pages, const at::Tensor& block_table, const at::Tensor& kept,
                  const at::Tensor& page_count, const at::Tensor& page_start,
                  const at::Tensor& key_index, const at::Tensor& value_index, int64_t block_size,
                  int64_t head_size, const at::Tensor& staged) {
  check_staged(pages, staged, block_size, head_size);
  const auto table = block_table.contiguous(), positions = kept.contiguous();
  const auto counts = page_count.contiguous(), starts = page_start.contiguous();
  check_long({table, positions, counts, starts, key_index, value_index});
  const int64_t num_heads = positions.size(1), max_kept = positions.size(2);
  const int64_t num_prompts = staged.size(0), num_pages = staged.size(1), width = staged.size(2);
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* where = positions.const_data_ptr<int64_t>();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  const int64_t* start = starts.const_data_ptr<int64_t>();
  const int64_t* keys = key_index.const_data_ptr<int64_t>();
  const int64_t* values = value_index.const_data_ptr<int64_t>();
  by_element_size(pages, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(pages.const_data_ptr());
    T* target = static_cast<T*>(staged.data_ptr());
    at::parallel_for(0, positions.size(0) * num_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / num_heads, num_tokens = count[i] * block_size;
        TORCH_CHECK(num_tokens <= max_kept && start[i] + count[i] <= num_pages,
                    "page_count: expected pages of ", max_kept, " tokens, up to page ", num_pages,
                    ", got ", count[i], " from page ", start[i]);
        T* to = target + (row % num_prompts * num_pages + start[i]) * width;
        for (int64_t k = 0; k < num_tokens; ++k, to += 2 * head_size) {
          const int64_t position = where[i * max_kept + k];
          const int64_t token = position % block_size * head_size;
          const int64_t block = blocks[row * table.size(1) + position / block_size];
          const T* from = source + (block * num_heads + i % num_heads) * width;
          for (int64_t d = 0; d < head_size; ++d) to[d] = from[keys[token + d]];
          for (int64_t d = 0; d < head_size; ++d) to[head_size + d] = from[values[token + d]];
        }
      }
    });
  });
}

// Staged pages into the head pages of the kept blocks, in place.
void write_pages(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
                 const at::Tensor& staged, const at::Tensor& num_pages,
                 const at::Tensor& num_full_blocks, const at::Tensor& num_kept_blocks,
                 const at::Tensor& key_index, const at::Tensor& value_index, int64_t block_size,
                 int64_t head_size, int64_t layer_pages) {
  check_staged(pages, staged, block_size, head_size);
  const auto table = block_table.contiguous(), counts = num_pages.contiguous();
  const auto full = num_full_blocks.contiguous(), kept = num_kept_blocks.contiguous();
  check_long({table, counts, full, kept, key_index, value_index});
  const int64_t max_pages = staged.size(1), width = staged.size(2);
  const int64_t* blocks = table.const_data_ptr<int64_t>();
  const int64_t* keys = key_index.const_data_ptr<int64_t>();
  const int64_t* values = value_index.const_data_ptr<int64_t>();
  by_element_size(pages, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(staged.const_data_ptr());
    T* target = static_cast<T*>(pages.data_ptr());
    at::parallel_for(0, staged.size(0) * max_pages, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t prompt = i / max_pages, number = i % max_pages;
        if (number >= counts.const_data_ptr<int64_t>()[prompt]) continue;
        const int64_t n = kept.const_data_ptr<int64_t>()[prompt];
        const int64_t first = full.const_data_ptr<int64_t>()[prompt] - n;
        const int64_t layer = number / (n * num_kv_heads), within = number % (n * num_kv_heads);
        const int64_t block = blocks[prompt * table.size(1) + first + within % n];
        T* to = target + (layer * layer_pages + block * num_kv_heads + within / n) * width;
        const T* from = source + i * width;
        for (int64_t t = 0; t < block_size; ++t, from += 2 * head_size) {
          const int64_t token = t * head_size;
          for (int64_t d = 0; d < head_size; ++d) to[keys[token + d]] = from[d];
          for (int64_t d = 0; d < head_size; ++d) to[values[token + d]] = from[head_size + d];
        }
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(vllm_kvcompress, m) {
  m.def("read_prompt(Tensor pages, Tensor block_table, int num_kv_heads, Tensor index, "
        "int head_size, Tensor? scale) -> Tensor", &read_prompt);
  m.def("stage_tokens(Tensor pages, Tensor block_table, Tensor kept, Tensor page_count, "
        "Tensor page_start, Tensor key_index, Tensor value_index, int block_size, int head_size, "
        "Tensor(a!) staged) -> ()", &stage_tokens);
  m.def("write_pages(Tensor(a!) pages, Tensor block_table, int num_kv_heads, Tensor staged, "
        "Tensor num_pages, Tensor num_full_blocks, Tensor num_kept_blocks, Tensor key_index, "
        "Tensor value_index, int block_size, int head_size, int layer_pages) -> ()", &write_pages);
}
