// SPDX-License-Identifier: Apache-2.0
// Attention of the rows of an instruction. Definitions: triton_kernels/reference_rows.py.

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "elements.h"
#include "row_attention.h"

namespace kvcompress {
namespace {

at::Tensor last_row_logits(const at::Tensor& queries, const at::Tensor& pages,
                           const at::Tensor& block_table, int64_t num_kv_heads,
                           const at::Tensor& key_index, const at::Tensor& prompt_lens,
                           const at::Tensor& instruction_len, const at::Tensor& scale,
                           double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [R, Q, Hq, D]");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong && instruction_len.scalar_type() == at::kLong,
              "prompt_lens and instruction_len: expected int64");
  const int64_t num = queries.size(0), num_rows = queries.size(1), head_size = queries.size(3);
  const int64_t group = queries.size(2) / num_kv_heads;
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  const at::Tensor source = queries.select(1, num_rows - 1).to(at::kFloat).contiguous();
  const at::Tensor lens = prompt_lens.contiguous(), texts = instruction_len.contiguous();
  const at::Tensor scales = row_scales(scale, num);
  auto result = at::full({num, queries.size(2), num_rows}, -std::numeric_limits<float>::infinity(),
                         source.options());
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "last_row_logits", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size);
    at::parallel_for(0, num * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
      PackedRows rows(group, head_size, softcap);
      std::vector<float> tile(head_size * kTileKeys);
      std::vector<float> logits(ceil_div(group, kRowBlock) * kRowBlock * kTileKeys);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / num_kv_heads, head = i % num_kv_heads;
        const int64_t prompt_len = lens.const_data_ptr<int64_t>()[n];
        const int64_t text = texts.const_data_ptr<int64_t>()[n];
        TORCH_CHECK(prompt_len <= length, "prompt_lens: expected at most ", length, ", got ",
                    prompt_len);
        TORCH_CHECK(0 <= text && text <= std::min(num_rows, prompt_len),
                    "instruction_len: expected at most ", std::min(num_rows, prompt_len),
                    ", got ", text);
        rows.start(scales.const_data_ptr<float>()[n]);
        for (int64_t g = 0; g < group; ++g) {
          rows.add(source.const_data_ptr<float>() + (i * group + g) * head_size, prompt_len);
        }
        float* out = result.mutable_data_ptr<float>() + i * group * num_rows + num_rows - text;
        for (int64_t done = 0; done < text; done += kTileKeys) {
          const int64_t start = prompt_len - text + done;
          keys.read_tile(n, head, start, prompt_len, tile.data());
          tile_kernels().logits(rows.rows(0, group), tile.data(), start, logits.data(), kTileKeys,
                                nullptr);
          for (int64_t g = 0; g < group; ++g) {
            std::copy_n(&logits[g * kTileKeys], std::min(kTileKeys, text - done),
                        out + g * num_rows + done);
          }
        }
      }
    });
  });
  return result;
}

// One prompt of elite_attention. Rows are those of positions first .. prompt_len - 1.
struct Instruction {
  bool is_visual(int64_t t) const { return segment[t] >= 0; }

  // Whether the row at a position is one of a query head's elite.
  bool is_elite(int64_t head, int64_t t) const {
    return t >= std::max<int64_t>(first(), 0) && elite[head * num_rows + t - first()];
  }

  int64_t first() const { return prompt_len - num_rows; }

  // Tiles of keys that some elite row looks at.
  std::vector<int64_t> tiles() const {
    std::vector<int64_t> starts;
    for (int64_t start = 0; start < prompt_len; start += kTileKeys) {
      bool wanted = false;
      for (int64_t t = start; t < std::min(start + kTileKeys, prompt_len) && !wanted; ++t) {
        wanted = is_visual(t);
        for (int64_t h = 0; h < num_heads && t >= first() && !wanted; ++h) wanted = is_elite(h, t);
      }
      if (wanted) starts.push_back(start);
    }
    return starts;
  }

  const float* queries;    // [Q, Hq, D]
  const bool* elite;       // [Hq, Q]
  const int64_t* segment;  // [length]
  int64_t num_rows, num_heads, prompt_len, length;
};

// out [Hq, length], zeros at first.
void attend(const Instruction& x, const KeyTiles& tiles, int64_t group, int64_t head_size,
            float scale, double softcap, float* out) {
  at::parallel_for(0, x.num_heads, 1, [&](int64_t begin, int64_t end) {
    PackedRows rows(x.num_rows, head_size, softcap, tiles.pairs);
    RowAttention attention(tiles);
    std::vector<uint8_t> hidden(tiles.num_keys());
    for (int64_t head = begin; head < end; ++head) {
      float* target = out + head * x.length;
      rows.start(scale);
      for (int64_t t = std::max<int64_t>(x.first(), 0); t < x.prompt_len; ++t) {
        const int64_t row = t - x.first();
        if (!x.is_elite(head, t)) continue;
        rows.add(x.queries + (row * x.num_heads + head) * head_size, t + 1);
      }
      if (rows.size() == 0) {
        for (int64_t t = 0; t < x.length; ++t) {
          if (x.is_visual(t)) target[t] = std::numeric_limits<float>::quiet_NaN();
        }
        continue;
      }
      for (int64_t i = 0; i < tiles.num_keys(); ++i) {
        const int64_t t = tiles.starts[i / kTileKeys] + i % kTileKeys;
        hidden[i] = t >= x.prompt_len || !(x.is_visual(t) || x.is_elite(head, t));
      }
      attention.run(rows, head / group, hidden.data(), 1.0f / static_cast<float>(rows.size()));
      for (int64_t i = 0; i < tiles.num_keys(); ++i) {
        const int64_t t = tiles.starts[i / kTileKeys] + i % kTileKeys;
        if (t < x.prompt_len && x.is_visual(t)) target[t] = attention.out[i];
      }
    }
  });
}

at::Tensor elite_attention(const at::Tensor& queries, const at::Tensor& elite,
                           const at::Tensor& segment, const at::Tensor& pages,
                           const at::Tensor& block_table, int64_t num_kv_heads,
                           const at::Tensor& key_index, const at::Tensor& prompt_lens,
                           const at::Tensor& scale, double softcap) {
  TORCH_CHECK(queries.dim() == 4, "queries: expected [R, Q, Hq, D]");
  TORCH_CHECK(elite.scalar_type() == at::kBool, "elite: expected bool");
  TORCH_CHECK(prompt_lens.scalar_type() == at::kLong && segment.scalar_type() == at::kLong,
              "prompt_lens and segment: expected int64");
  const int64_t num = queries.size(0), num_rows = queries.size(1), num_heads = queries.size(2);
  const int64_t head_size = queries.size(3);
  const int64_t length = block_table.size(1) * (key_index.numel() / head_size);
  TORCH_CHECK(segment.size(1) == length, "segment: expected [N, ", length, "]");
  const at::Tensor source = queries.to(at::kFloat).contiguous(), lens = prompt_lens.contiguous();
  const at::Tensor chosen = elite.contiguous(), segments = segment.contiguous();
  const at::Tensor scales = row_scales(scale, num);
  auto result = at::zeros({num, num_heads, length}, source.options());
  KV_DISPATCH_ELEMENTS(pages.scalar_type(), "elite_attention", [&] {
    const PromptKeys<scalar_t> keys(pages, block_table, num_kv_heads, key_index, head_size,
                                    in_pairs(queries, pages));
    for (int64_t n = 0; n < num; ++n) {
      const int64_t prompt_len = lens.const_data_ptr<int64_t>()[n];
      TORCH_CHECK(0 < prompt_len && prompt_len <= length, "prompt_lens: expected 1 to ", length,
                  ", got ", prompt_len);
      const Instruction x{source.const_data_ptr<float>() + n * source.stride(0),
                          chosen.const_data_ptr<bool>() + n * chosen.stride(0),
                          segments.const_data_ptr<int64_t>() + n * length,
                          num_rows, num_heads, prompt_len, length};
      const KeyTiles tiles = read_tiles(keys, n, num_kv_heads, x.tiles(), prompt_len);
      attend(x, tiles, num_heads / num_kv_heads, head_size, scales.const_data_ptr<float>()[n],
             softcap, result.mutable_data_ptr<float>() + n * result.stride(0));
    }
  });
  return result;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("last_row_logits(Tensor queries, Tensor pages, Tensor block_table, int num_kv_heads, "
        "Tensor key_index, Tensor prompt_lens, Tensor instruction_len, Tensor scale, "
        "float softcap) -> Tensor", &kvcompress::last_row_logits);
  m.def("elite_attention(Tensor queries, Tensor elite, Tensor segment, Tensor pages, "
        "Tensor block_table, int num_kv_heads, Tensor key_index, Tensor prompt_lens, Tensor scale, "
        "float softcap) -> Tensor", &kvcompress::elite_attention);
}
