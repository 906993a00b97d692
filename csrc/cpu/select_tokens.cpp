// SPDX-License-Identifier: Apache-2.0
// Exact top-k of every head, and head budgets. Definitions: triton_kernels/reference_scores.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "ranking.h"
#include "threads.h"

namespace kvcompress {
namespace {

// Kept positions of one head, ascending; entries beyond `count` become `length`.
void select_head(const float* scores, int64_t length, int64_t count, int64_t candidate_end,
                 int64_t protected_end, int64_t max_count, std::vector<uint32_t>& keys, int64_t* out) {
  count = std::min(count, max_count);
  protected_end = std::max(protected_end, candidate_end);
  const int64_t num_protected = std::min(protected_end - candidate_end, count);
  const int64_t num_best = std::min(count - num_protected, candidate_end);
  int64_t kept = 0;
  if (num_best == candidate_end) {
    while (kept < num_best) out[kept] = kept, ++kept;
  } else if (num_best > 0) {
    for (int64_t t = 0; t < candidate_end; ++t) keys[t] = order_key(scores[t]);
    const Threshold threshold = find_threshold(keys.data(), candidate_end, num_best);
    int64_t ties = threshold.ties;
    for (int64_t t = 0; kept < num_best; ++t) {
      const bool tie = keys[t] == threshold.key && ties > 0;
      ties -= tie;
      out[kept] = t;
      kept += tie || keys[t] > threshold.key;
    }
  }
  for (int64_t t = candidate_end; t < candidate_end + num_protected; ++t) out[kept++] = t;
  for (int64_t t = protected_end; kept < count; ++t) out[kept++] = t;  // more than there are
  std::fill(out + kept, out + max_count, length);
}

at::Tensor select_tokens(const at::Tensor& scores, const at::Tensor& count,
                         const at::Tensor& candidate_end, const at::Tensor& protected_end,
                         int64_t max_count) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat,
              "scores: expected float32 [N, Hkv, T]");
  const auto x = scores.contiguous(), counts = count.contiguous();
  const auto candidates = candidate_end.contiguous(), ends = protected_end.contiguous();
  for (const auto& t : {counts, candidates, ends}) {
    TORCH_CHECK(t.scalar_type() == at::kLong, "counts and positions: expected int64");
  }
  const int64_t num_heads = x.size(1), length = x.size(2), width = std::min(max_count, length);
  auto kept = at::empty({x.size(0), num_heads, width}, counts.options());
  const float* score = x.const_data_ptr<float>();
  const int64_t* head_count = counts.const_data_ptr<int64_t>();
  const int64_t* num = candidates.const_data_ptr<int64_t>();
  const int64_t* protected_ends = ends.const_data_ptr<int64_t>();
  int64_t* out = kept.mutable_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0) * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(length);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / num_heads;
      select_head(score + i * length, length, head_count[i], std::clamp<int64_t>(num[n], 0, length),
                  std::clamp<int64_t>(protected_ends[n], 0, length), width, keys, out + i * width);
    }
  });
  return kept;
}

// Entries of each head among the heads' num_heads * capacity best together; ties go to lower heads.
// scores [num_heads, length]; keys has room for as many.
void count_heads(const float* scores, int64_t num_heads, int64_t length, int64_t capacity,
                 bool normalize, uint32_t* keys, int64_t* counts) {
  for (int64_t h = 0; h < num_heads; ++h) {
    const float* row = scores + h * length;
    uint32_t* row_keys = keys + h * length;
    // NaN counts as -inf
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t t = 0; t < length; ++t) {
      row_keys[t] = order_key(row[t] == row[t] ? row[t] : lowest);
    }
    if (!normalize) continue;
    const Threshold threshold = find_threshold(row_keys, length, std::min(capacity, length));
    double mass = 0, top = 0;
    for (int64_t t = 0; t < length; ++t) {
      const double value = row[t] > 0 ? row[t] : 0;
      mass += value;
      top += row_keys[t] > threshold.key ? value : 0;
    }
    top += static_cast<double>(threshold.ties) * std::max(score_of(threshold.key), 0.0f);
    // a head without mass has nothing to scale
    const float share = static_cast<float>(top) / static_cast<float>(mass);
    if (share != share) continue;
    for (int64_t t = 0; t < length; ++t) {
      row_keys[t] = order_key(row[t] == row[t] ? row[t] * share : lowest);
    }
  }
  const int64_t total = num_heads * length, best = std::min(num_heads * capacity, total);
  const Threshold threshold = find_threshold(keys, total, best);
  int64_t ties = threshold.ties;
  for (int64_t h = 0; h < num_heads; ++h) {
    int64_t above = 0, equal = 0;
    for (int64_t t = h * length; t < (h + 1) * length; ++t) {
      above += keys[t] > threshold.key;
      equal += keys[t] == threshold.key;
    }
    const int64_t taken = std::min(equal, ties);
    ties -= taken;
    counts[h] = above + taken;
  }
}

at::Tensor head_counts(const at::Tensor& base, const at::Tensor& capacity, bool normalize) {
  TORCH_CHECK(base.dim() == 3 && base.scalar_type() == at::kFloat,
              "base: expected float32 [N, Hkv, T]");
  TORCH_CHECK(capacity.scalar_type() == at::kLong, "capacity: expected int64");
  const auto x = base.contiguous(), capacities = capacity.contiguous();
  const int64_t num_heads = x.size(1), length = x.size(2);
  auto counts = at::empty({x.size(0), num_heads}, capacities.options());
  const float* scores = x.const_data_ptr<float>();
  const int64_t* nominal = capacities.const_data_ptr<int64_t>();
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0), grain_of(num_heads * length), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(num_heads * length);
    for (int64_t n = begin; n < end; ++n) {
      count_heads(scores + n * num_heads * length, num_heads, length, nominal[n], normalize,
                  keys.data(), out + n * num_heads);
    }
  });
  return counts;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("select_tokens(Tensor scores, Tensor count, Tensor candidate_end, Tensor protected_end, "
        "int max_count) -> Tensor", &kvcompress::select_tokens);
  m.def("head_counts(Tensor base, Tensor capacity, bool normalize) -> Tensor",
        &kvcompress::head_counts);
}
