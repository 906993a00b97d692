// SPDX-License-Identifier: Apache-2.0
// Pooling over the scored prefix, and BACON's scores from window attention, one KV head of a row
// at a time. Definitions: triton_kernels/reference_scores.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pooling.h"
#include "ranking.h"
#include "threads.h"

namespace kvcompress {
namespace {

constexpr float kEpsilon = 1e-8f;

at::Tensor pool_prefix(const at::Tensor& scores, const at::Tensor& num_candidates, int64_t kernel,
                       bool take_max, const std::optional<at::Tensor>& lines) {
  check_scores(scores, num_candidates);
  const ImageLines images(lines);
  const auto x = scores.contiguous(), scored = num_candidates.contiguous();
  const int64_t num_heads = x.size(1), length = x.size(2);
  auto pooled = at::empty(x.sizes(), x.options());
  const float* from = x.const_data_ptr<float>();
  const int64_t* counts = scored.const_data_ptr<int64_t>();
  float* to = pooled.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0) * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t count = std::clamp<int64_t>(counts[i / num_heads], 0, length);
      pool_row(from + i * length, count, length, kernel, take_max, 0.0f, to + i * length);
      images.pool(i / num_heads, from + i * length, count, kernel, take_max, to + i * length);
    }
  });
  return pooled;
}

struct Spread {
  float mean, deviation;
};

// Mean and population deviation of the k largest of x; NaN counts as the largest.
Spread largest(const float* x, int64_t count, int64_t k, std::vector<uint32_t>& keys) {
  for (int64_t t = 0; t < count; ++t) keys[t] = order_key(x[t]);
  const Threshold threshold = find_threshold(keys.data(), count, k);
  const double at_threshold = score_of(threshold.key), ties = static_cast<double>(threshold.ties);
  double sum = ties * at_threshold;
  for (int64_t t = 0; t < count; ++t) {
    sum += x[t] != x[t] || keys[t] > threshold.key ? static_cast<double>(x[t]) : 0.0;
  }
  const double mean = sum / static_cast<double>(k);
  double squares = ties * (at_threshold - mean) * (at_threshold - mean);
  for (int64_t t = 0; t < count; ++t) {
    const double off = static_cast<double>(x[t]) - mean;
    squares += keys[t] > threshold.key ? off * off : 0.0;
  }
  const double deviation = std::sqrt(squares / static_cast<double>(k));
  return {static_cast<float>(mean), static_cast<float>(deviation)};
}

enum class Mode { kEvidence, kLocal, kTrace, kRelative };

Mode parse_mode(const std::string& mode) {
  if (mode == "e") return Mode::kEvidence;
  if (mode == "el") return Mode::kLocal;
  if (mode == "elt") return Mode::kTrace;
  TORCH_CHECK(mode == "rel", "mode: expected e, el, elt or rel, got ", mode);
  return Mode::kRelative;
}

// What one thread needs for its heads, [T] each.
struct Scratch {
  explicit Scratch(int64_t length)
      : value(length), near(length), neighbours(length), keys(length) {}
  std::vector<float> value, near, neighbours;
  std::vector<uint32_t> keys;
};

// V = evidence + coherence + persistence of one head.
void combine(const float* base, const float* evidence, const std::vector<const float*>& trace,
             const ImageLines& images, int64_t row, int64_t count, Mode mode, int64_t local_k,
             Scratch& scratch) {
  float* value = scratch.value.data();
  std::copy_n(evidence, count, value);
  if (mode == Mode::kEvidence) return;
  const float *near = scratch.near.data(), *neighbours = scratch.neighbours.data();
  pool_mean(evidence, count, local_k, scratch.near.data());
  images.pool(row, evidence, count, local_k, false, scratch.near.data());
  if (mode == Mode::kRelative) {
    pool_mean(base, count, local_k, scratch.neighbours.data());
    images.pool(row, base, count, local_k, false, scratch.neighbours.data());
    for (int64_t t = 0; t < count; ++t) {
      value[t] += near[t] * neighbours[t] / (neighbours[t] + base[t] + kEpsilon);
    }
  } else {
    for (int64_t t = 0; t < count; ++t) value[t] += near[t];
  }
  if (mode == Mode::kLocal || trace.empty()) return;
  const float layers = static_cast<float>(trace.size());
  for (int64_t t = 0; t < count; ++t) {
    float mean = 0, squares = 0;
    for (const float* layer : trace) mean += layer[t];
    mean /= layers;
    if (mode == Mode::kRelative) {
      for (const float* layer : trace) squares += (layer[t] - mean) * (layer[t] - mean);
      mean -= std::sqrt(squares / layers);
      mean = mean < 0.0f ? 0.0f : mean;
    }
    value[t] += mean;
  }
}

struct Options {
  Mode mode;
  int64_t local_k;
  double lambda_c, topk_frac;
};

// lambda of one head: how strongly V = scratch.value is added to the importance.
float strength_of(const float* base, int64_t count, int64_t capacity, const Options& options,
                  Scratch& scratch) {
  const double wanted = options.topk_frac * static_cast<double>(capacity);
  const int64_t top = std::min(std::max<int64_t>(static_cast<int64_t>(wanted), 1), count);
  const Spread of_base = largest(base, count, top, scratch.keys);
  const Spread of_value = largest(scratch.value.data(), count, top, scratch.keys);
  const float matched =
      static_cast<float>(options.lambda_c) * of_base.deviation / (of_value.deviation + kEpsilon);
  if (options.mode != Mode::kTrace) return matched;
  const float gate = of_value.mean / (of_base.mean + kEpsilon);
  return matched * (gate < 0.0f ? 0.0f : gate > 1.0f ? 1.0f : gate);
}

std::tuple<at::Tensor, at::Tensor> bacon_evidence(const at::Tensor& mean, const at::Tensor& last,
                                                  const at::Tensor& num_candidates, int64_t kernel,
                                                  bool take_max) {
  check_scores(mean, num_candidates);
  check_scores(last, num_candidates);
  TORCH_CHECK(last.sizes() == mean.sizes(), "mean and last: expected the same shape");
  const auto means = mean.contiguous(), lasts = last.contiguous();
  const auto scored = num_candidates.contiguous();
  const int64_t num_heads = mean.size(1), length = mean.size(2);
  auto base = at::empty(means.sizes(), means.options());
  auto evidence = at::empty(means.sizes(), means.options());
  float *bases = base.mutable_data_ptr<float>(), *more = evidence.mutable_data_ptr<float>();
  at::parallel_for(0, mean.size(0) * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      constexpr float lowest = -std::numeric_limits<float>::infinity();
      const int64_t at = i * length;
      const int64_t count =
          std::clamp<int64_t>(scored.const_data_ptr<int64_t>()[i / num_heads], 0, length);
      float *b = bases + at, *e = more + at;
      pool_row(means.const_data_ptr<float>() + at, count, length, kernel, take_max, lowest, b);
      pool_row(lasts.const_data_ptr<float>() + at, count, length, kernel, take_max, 0.0f, e);
      for (int64_t t = 0; t < count; ++t) {
        const float above = e[t] - b[t];
        e[t] = above < 0.0f ? 0.0f : above;
      }
    }
  });
  return {base, evidence};
}

at::Tensor bacon_calibrate(const at::Tensor& base, const at::Tensor& evidence,
                           const at::Tensor& trace, const at::Tensor& num_candidates,
                           const at::Tensor& capacity, const std::optional<at::Tensor>& lines,
                           int64_t trace_r, std::string mode, int64_t local_k, double lambda_c,
                           double topk_frac) {
  const ImageLines images(lines);
  const Options options{parse_mode(mode), local_k, lambda_c, topk_frac};
  check_scores(base, num_candidates);
  check_scores(evidence, num_candidates);
  TORCH_CHECK(evidence.sizes() == base.sizes(), "base and evidence: expected the same shape");
  TORCH_CHECK(capacity.scalar_type() == at::kLong, "capacity: expected int64");
  const int64_t num_rows = base.size(0), num_heads = base.size(1), length = base.size(2);
  TORCH_CHECK(trace.dim() == 4 && trace.scalar_type() == at::kFloat && trace.size(1) > 0 &&
                  num_rows % trace.size(1) == 0 && trace.size(2) == num_heads &&
                  trace.size(3) == length,
              "trace: expected float32 [Lt, N, Hkv, T]");
  const int64_t num_prompts = trace.size(1), first = trace.size(0) - num_rows / num_prompts;
  TORCH_CHECK(first >= 0, "trace: expected the rows' own layers at its end");
  const auto bases = base.contiguous(), more = evidence.contiguous();
  const auto layers = trace.stride(3) == 1 ? trace : trace.contiguous();
  const auto scored = num_candidates.contiguous(), capacities = capacity.contiguous();
  auto final = bases.clone();
  float* out = final.mutable_data_ptr<float>();
  at::parallel_for(0, num_rows * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    Scratch scratch(length);
    std::vector<const float*> seen;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / num_heads, head = i % num_heads;
      const int64_t count =
          std::clamp<int64_t>(scored.const_data_ptr<int64_t>()[row], 0, length);
      if (count == 0) continue;
      const int64_t layer = first + row / num_prompts;
      seen.clear();
      for (int64_t j = std::max<int64_t>(layer - trace_r, 0); j < layer; ++j) {
        seen.push_back(layers.const_data_ptr<float>() + j * layers.stride(0) +
                       row % num_prompts * layers.stride(1) + head * layers.stride(2));
      }
      const float* b = bases.const_data_ptr<float>() + i * length;
      combine(b, more.const_data_ptr<float>() + i * length, seen, images, row, count,
              options.mode, options.local_k, scratch);
      const float strength =
          strength_of(b, count, capacities.const_data_ptr<int64_t>()[row], options, scratch);
      float* s = out + i * length;
      for (int64_t t = 0; t < count; ++t) s[t] += strength * scratch.value[t];
    }
  });
  return final;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("pool_prefix(Tensor scores, Tensor num_candidates, int kernel, bool take_max, "
        "Tensor? lines) -> Tensor",
        &kvcompress::pool_prefix);
  m.def("bacon_evidence(Tensor mean, Tensor last, Tensor num_candidates, int kernel, "
        "bool take_max) -> (Tensor, Tensor)", &kvcompress::bacon_evidence);
  m.def("bacon_calibrate(Tensor base, Tensor evidence, Tensor trace, Tensor num_candidates, "
        "Tensor capacity, Tensor? lines, int trace_r, str mode, int local_k, float lambda_c, "
        "float topk_frac) -> Tensor", &kvcompress::bacon_calibrate);
}
