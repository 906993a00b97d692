// SPDX-License-Identifier: Apache-2.0
// Reading and compacting head pages of vLLM's CPU cache. Definitions: triton_kernels/reference.py.
//
// A page keeps block_size tokens of one KV head, keys and values each in an order that depends on the
// instruction set; the index tables say where element (token, d) stands.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

// One part (keys or values) of whole prompts, in token order, as float32: [N, Hkv, B * block_size, D].
at::Tensor read_prompt(const at::Tensor& pages, const at::Tensor& block_table, int64_t num_kv_heads,
                       const at::Tensor& index, int64_t head_size) {
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
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, pages.scalar_type(), "read_prompt", [&] {
    const scalar_t* source = pages.const_data_ptr<scalar_t>();
    at::parallel_for(0, num_pages, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / (num_kv_heads * num_blocks);
        const int64_t head = i / num_blocks % num_kv_heads;
        const int64_t block = blocks[row * num_blocks + i % num_blocks];
        const scalar_t* page = source + (block * num_kv_heads + head) * page_elems;
        float* tokens = target + i * part;
        for (int64_t e = 0; e < part; ++e) tokens[e] = static_cast<float>(page[where[e]]);
      }
    });
  });
  return out;
}

template <typename T>
void compact_head_pages(T* pages, int64_t page_elems, const int64_t* blocks, int64_t num_blocks,
                        int64_t num_heads, const int64_t* kept, int64_t max_kept,
                        const int64_t* count, const int64_t* start, int64_t num_full,
                        int64_t num_kept, const int64_t* key_index, const int64_t* value_index,
                        int64_t block_size, int64_t head_size, std::vector<T>& staged) {
  // everything is read before anything is written: sources and targets overlap
  staged.resize(num_heads * max_kept * 2 * head_size);
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t k = 0; k < count[h] * block_size; ++k) {
      const int64_t position = kept[h * max_kept + k];
      const int64_t token = position % block_size * head_size;
      const T* page = pages + (blocks[position / block_size] * num_heads + h) * page_elems;
      T* row = staged.data() + (h * max_kept + k) * 2 * head_size;
      for (int64_t d = 0; d < head_size; ++d) row[d] = page[key_index[token + d]];
      for (int64_t d = 0; d < head_size; ++d) row[head_size + d] = page[value_index[token + d]];
    }
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    for (int64_t p = 0; p < count[h]; ++p) {
      const int64_t number = start[h] + p;
      const int64_t block = blocks[num_full - num_kept + number % num_kept];
      T* page = pages + (block * num_heads + number / num_kept) * page_elems;
      const T* rows = staged.data() + (h * max_kept + p * block_size) * 2 * head_size;
      for (int64_t t = 0; t < block_size; ++t) {
        const T* row = rows + t * 2 * head_size;
        const int64_t token = t * head_size;
        for (int64_t d = 0; d < head_size; ++d) page[key_index[token + d]] = row[d];
        for (int64_t d = 0; d < head_size; ++d) page[value_index[token + d]] = row[head_size + d];
      }
    }
  }
}

// Moves kept tokens into the head pages of the kept blocks, in place; whatever the element type.
void compact_pages(const at::Tensor& pages, const at::Tensor& block_table, const at::Tensor& kept,
                   const at::Tensor& page_count, const at::Tensor& page_start,
                   const at::Tensor& num_full_blocks, const at::Tensor& num_kept_blocks,
                   const at::Tensor& key_index, const at::Tensor& value_index, int64_t block_size,
                   int64_t head_size) {
  TORCH_CHECK(pages.dim() == 2 && pages.is_contiguous(), "pages: expected contiguous [P, E]");
  const auto table = block_table.contiguous(), positions = kept.contiguous();
  const auto count = page_count.contiguous(), start = page_start.contiguous();
  const auto full = num_full_blocks.contiguous(), keep = num_kept_blocks.contiguous();
  for (const auto& t : {table, positions, count, start, full, keep, key_index, value_index}) {
    TORCH_CHECK(t.scalar_type() == at::kLong, "tables and counts: expected int64");
  }
  const int64_t num_heads = positions.size(1), max_kept = positions.size(2);
  const auto run = [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    at::parallel_for(0, positions.size(0), 1, [&](int64_t begin, int64_t end) {
      std::vector<T> staged;
      for (int64_t i = begin; i < end; ++i) {
        compact_head_pages<T>(
            data, pages.size(1), table.const_data_ptr<int64_t>() + i * table.size(1), table.size(1),
            num_heads, positions.const_data_ptr<int64_t>() + i * num_heads * max_kept, max_kept,
            count.const_data_ptr<int64_t>() + i * num_heads,
            start.const_data_ptr<int64_t>() + i * num_heads, full.const_data_ptr<int64_t>()[i],
            keep.const_data_ptr<int64_t>()[i], key_index.const_data_ptr<int64_t>(),
            value_index.const_data_ptr<int64_t>(), block_size, head_size, staged);
      }
    });
  };
  void* data = pages.data_ptr();
  switch (pages.element_size()) {
    case 1: return run(static_cast<uint8_t*>(data));
    case 2: return run(static_cast<uint16_t*>(data));
    case 4: return run(static_cast<uint32_t*>(data));
    default: TORCH_CHECK(false, "pages: expected elements of 1, 2 or 4 bytes");
  }
}

}  // namespace

TORCH_LIBRARY(vllm_kvcompress, m) {
  m.def("read_prompt(Tensor pages, Tensor block_table, int num_kv_heads, Tensor index, "
        "int head_size) -> Tensor", &read_prompt);
  m.def("compact_pages(Tensor(a!) pages, Tensor block_table, Tensor kept, Tensor page_count, "
        "Tensor page_start, Tensor num_full_blocks, Tensor num_kept_blocks, Tensor key_index, "
        "Tensor value_index, int block_size, int head_size) -> ()", &compact_pages);
}
