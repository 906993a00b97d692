// SPDX-License-Identifier: Apache-2.0
// Pooling of one KV head's scores over the scored prefix, along the prompt or along the columns of
// images.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>

namespace kvcompress {

// The larger of two numbers; NaN is the largest.
inline float larger(float a, float b) { return b <= a || a != a ? a : b; }

// out[t] = mean over [t - width/2, t + width/2], zeros outside [0, count) included.
inline void pool_mean(const float* x, int64_t count, int64_t width, float* out) {
  const int64_t half = width / 2;
  const float divisor = static_cast<float>(width);
  std::fill_n(out, count, 0.0f);
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(count, count - shift);
    for (int64_t t = begin; t < end; ++t) out[t] += x[t + shift];
  }
  for (int64_t t = 0; t < count; ++t) out[t] /= divisor;
}

// out[t] = maximum over the part of [t - width/2, t + width/2] that lies in [0, count).
inline void pool_max(const float* x, int64_t count, int64_t width, float* out) {
  const int64_t half = width / 2;
  std::copy_n(x, count, out);
  for (int64_t shift = -half; shift <= half; ++shift) {
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(count, count - shift);
    for (int64_t t = begin; t < end; ++t) out[t] = larger(out[t], x[t + shift]);
  }
}

// Pooled scores of the prefix [0, count), `outside` beyond it.
inline void pool_row(const float* x, int64_t count, int64_t length, int64_t width, bool take_max,
              float outside, float* out) {
  (take_max ? pool_max : pool_mean)(x, count, width, out);
  std::fill(out + count, out + length, outside);
}

// Rows and columns of the images of each row.
class ImageLines {
 public:
  struct Image {
    int64_t first, end, width, step;  // step 0: its grid does not count
  };

  // lines [R, M, 4] int64, see Grids in triton_kernels/reference_grid.py; without any, no image.
  explicit ImageLines(const std::optional<at::Tensor>& lines) {
    if (!lines) return;
    TORCH_CHECK(lines->dim() == 3 && lines->size(2) == 4 && lines->scalar_type() == at::kLong,
                "lines: expected int64 [R, M, 4]");
    lines_ = lines->contiguous();
    count_ = lines->size(1);
  }

  int64_t count() const { return count_; }

  Image image(int64_t row, int64_t index) const {
    const int64_t* at = lines_.const_data_ptr<int64_t>() + (row * count_ + index) * 4;
    return {at[0], at[1], at[2], at[3]};
  }

  // Calls visit(image, stop, t) for each token t < stop of the images of a row whose grids count;
  // the scored part of an image ends at stop.
  template <typename Visit>
  void each_token(int64_t row, int64_t index, int64_t count, Visit visit) const {
    const Image image = this->image(row, index);
    if (image.step == 0) return;
    const int64_t stop = std::min(image.end, count);
    for (int64_t begin = image.first; begin < stop; begin += image.step) {
      const int64_t end = std::min(begin + image.width, stop);
      for (int64_t t = begin; t < end; ++t) visit(image, stop, t);
    }
  }

  // Pools x [count] at the tokens of a row's images along their columns.
  void pool(int64_t row, const float* x, int64_t count, int64_t width, bool take_max,
            float* out) const {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < count_; ++i) {
      each_token(row, i, count, [&](const Image& image, int64_t stop, int64_t t) {
        float pooled = take_max ? x[t] : 0.0f;
        for (int64_t tap = -half; tap <= half; ++tap) {
          const int64_t at = t + tap * image.step;
          if (at < image.first || at >= stop) continue;
          pooled = take_max ? larger(pooled, x[at]) : pooled + x[at];
        }
        out[t] = take_max ? pooled : pooled / static_cast<float>(width);
      });
    }
  }

 private:
  at::Tensor lines_;
  int64_t count_ = 0;
};

inline void check_scores(const at::Tensor& scores, const at::Tensor& num_candidates) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat,
              "scores: expected float32 [R, Hkv, T]");
  TORCH_CHECK(num_candidates.scalar_type() == at::kLong, "num_candidates: expected int64");
}

}  // namespace kvcompress
