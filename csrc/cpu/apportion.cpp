// SPDX-License-Identifier: Apache-2.0
// Real shares as integers of a given sum. Definition: triton_kernels/reference_budgets.py.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "threads.h"

namespace kvcompress {
namespace {

// One row after the other; vectors are one thread's.
class Row {
 public:
  explicit Row(int64_t count) : fractions_(count), rooms_(count), sorted_(count), order_(count) {}

  // Shares [X] between low and high as integers of the sum total, or of the nearest possible one.
  void apportion(const double* shares, int64_t total, int64_t low, int64_t high, int64_t* out) {
    const int64_t count = static_cast<int64_t>(order_.size());
    int64_t rest = std::min(std::max(total, count * low), count * high);
    for (int64_t i = 0; i < count; ++i) {
      const double share = std::min(std::max(static_cast<double>(low), shares[i]),
                                    static_cast<double>(high));
      const double whole = std::floor(share + 1e-12);
      // equal shares tie in spite of float noise
      fractions_[i] = std::nearbyint((share - whole) * 1e9);
      out[i] = static_cast<int64_t>(whole);
      rest -= out[i];
    }
    const bool give = rest > 0;
    for (int64_t i = 0; i < count; ++i) rooms_[i] = give ? high - out[i] : out[i] - low;
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
      return give ? fractions_[a] > fractions_[b] : fractions_[a] < fractions_[b];
    });
    deal(std::abs(rest), give ? 1 : -1, out);
  }

 private:
  // Adds step to one entry per card, in order, cyclically, as long as entries have room.
  void deal(int64_t cards, int64_t step, int64_t* out) {
    sorted_ = rooms_;
    std::sort(sorted_.begin(), sorted_.end());
    int64_t rounds = 0, open = static_cast<int64_t>(order_.size());
    for (const int64_t room : sorted_) {
      const int64_t more = std::min(room - rounds, cards / open);
      rounds += more;
      cards -= more * open;
      if (rounds < room) break;
      --open;
    }
    for (const int64_t i : order_) {
      const bool turn = cards > 0 && rooms_[i] > rounds;
      cards -= turn;
      out[i] += step * (std::min(rooms_[i], rounds) + turn);
    }
  }

  std::vector<double> fractions_;
  std::vector<int64_t> rooms_, sorted_, order_;
};

at::Tensor apportion(const at::Tensor& shares, const at::Tensor& total, const at::Tensor& low,
                     const at::Tensor& high) {
  TORCH_CHECK(shares.dim() == 2 && shares.scalar_type() == at::kDouble,
              "shares: expected float64 [N, X]");
  for (const at::Tensor& t : {total, low, high}) {
    TORCH_CHECK(t.scalar_type() == at::kLong && t.dim() == 1 && t.size(0) == shares.size(0),
                "total, low and high: expected int64 [N]");
  }
  const auto x = shares.contiguous(), totals = total.contiguous();
  const auto lows = low.contiguous(), highs = high.contiguous();
  const int64_t count = x.size(1);
  auto result = at::empty(x.sizes(), totals.options());
  int64_t* out = result.mutable_data_ptr<int64_t>();
  at::parallel_for(0, x.size(0), grain_of(32 * count), [&](int64_t begin, int64_t end) {
    Row row(count);
    for (int64_t i = begin; i < end; ++i) {
      row.apportion(x.const_data_ptr<double>() + i * count, totals.const_data_ptr<int64_t>()[i],
                    lows.const_data_ptr<int64_t>()[i], highs.const_data_ptr<int64_t>()[i],
                    out + i * count);
    }
  });
  return result;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("apportion(Tensor shares, Tensor total, Tensor low, Tensor high) -> Tensor",
        &kvcompress::apportion);
}
