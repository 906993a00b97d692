// SPDX-License-Identifier: Apache-2.0
// What scores know of images, and window scores that are raised and weighed. Definitions:
// triton_kernels/reference_grid.py.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "pooling.h"
#include "threads.h"

namespace kvcompress {
namespace {

constexpr float kTiny = 1e-30f;

at::Tensor grid_balance(const at::Tensor& scores, const at::Tensor& num_candidates,
                        const at::Tensor& lines) {
  check_scores(scores, num_candidates);
  const ImageLines images(lines);
  const auto x = scores.contiguous(), scored = num_candidates.contiguous();
  const int64_t num_heads = x.size(1), length = x.size(2), num_images = images.count();
  auto balance = at::empty({x.size(0), num_heads, num_images}, x.options());
  float* out = balance.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0) * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / num_heads;
      const int64_t count =
          std::clamp<int64_t>(scored.const_data_ptr<int64_t>()[row], 0, length);
      const float* s = x.const_data_ptr<float>() + i * length;
      for (int64_t j = 0; j < num_images; ++j) {
        double sum = 0;
        images.each_token(row, j, count, [&](const ImageLines::Image& image, int64_t stop,
                                             int64_t t) {
          const bool has_right = (t - image.first) % image.step + 1 < image.width;
          if (has_right && t + 1 < count) sum += std::sqrt(s[t] * s[t + 1]);
          if (t + image.step < stop) sum -= std::sqrt(s[t] * s[t + image.step]);
        });
        out[i * num_images + j] = static_cast<float>(sum);
      }
    }
  });
  return balance;
}

std::tuple<at::Tensor, at::Tensor> weigh_scores(const at::Tensor& base,
                                                const at::Tensor& num_candidates,
                                                const std::optional<at::Tensor>& weight,
                                                const std::optional<at::Tensor>& last,
                                                bool clamp) {
  check_scores(base, num_candidates);
  for (const auto* other : {&weight, &last}) {
    TORCH_CHECK(!*other || ((*other)->sizes() == base.sizes() &&
                            (*other)->scalar_type() == at::kFloat),
                "weight and last: expected float32 in the shape of base");
  }
  const auto x = base.contiguous(), scored = num_candidates.contiguous();
  const auto weights = weight ? weight->contiguous() : at::Tensor();
  const auto lasts = last ? last->contiguous() : at::Tensor();
  const int64_t num_heads = x.size(1), length = x.size(2);
  auto raised = at::empty(x.sizes(), x.options());
  auto scaled = at::empty(last ? x.sizes() : at::IntArrayRef({0}), x.options());
  at::parallel_for(0, x.size(0) * num_heads, grain_of(length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * length;
      const int64_t count =
          std::clamp<int64_t>(scored.const_data_ptr<int64_t>()[i / num_heads], 0, length);
      const float* from = x.const_data_ptr<float>() + at;
      float* to = raised.mutable_data_ptr<float>() + at;
      double sum = 0, mass = 0, last_mass = 0;
      for (int64_t t = 0; t < count; ++t) sum += from[t];
      const float level = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(count, 1)));
      for (int64_t t = 0; t < count; ++t) {
        to[t] = clamp ? larger(from[t], level) : from[t];
        if (weight) to[t] *= weights.const_data_ptr<float>()[at + t];
        mass += to[t];
      }
      std::fill(to + count, to + length, 0.0f);
      if (!last) continue;
      const float* q = lasts.const_data_ptr<float>() + at;
      float* out = scaled.mutable_data_ptr<float>() + at;
      for (int64_t t = 0; t < count; ++t) last_mass += q[t];
      const float factor = static_cast<float>(mass / std::max<double>(last_mass, kTiny));
      for (int64_t t = 0; t < count; ++t) out[t] = q[t] * factor;
      std::fill(out + count, out + length, 0.0f);
    }
  });
  return {raised, scaled};
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("grid_balance(Tensor scores, Tensor num_candidates, Tensor lines) -> Tensor",
        &kvcompress::grid_balance);
  m.def("weigh_scores(Tensor base, Tensor num_candidates, Tensor? weight, Tensor? last, "
        "bool clamp) -> (Tensor, Tensor)",
        &kvcompress::weigh_scores);
}
