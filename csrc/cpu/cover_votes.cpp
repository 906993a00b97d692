// SPDX-License-Identifier: Apache-2.0
// How many groups of rows need a token to cover what they look at. Definition:
// triton_kernels/reference_rows.py.
//
// Tokens are not sorted: where a cover ends is searched from the leading bits of the masses down.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "query_rows.h"
#include "threads.h"

namespace kvcompress {
namespace {

constexpr int kUnitBits = 39, kShareBits = 30;
constexpr int64_t kTileTokens = 1024;

// A cover: tokens of at least this mass before tie_end, of more than this mass from there on.
struct Cover {
  float least;
  int64_t tie_end;
};

constexpr Cover kAll{-1.0f, 0}, kNothing{std::numeric_limits<float>::infinity(), 0};

// share * total / 2^kShareBits, rounded down, or up. The product would not fit into 64 bits.
int64_t part_of(int64_t total, int64_t share, bool up) {
  const int64_t high = total >> kShareBits, low = total & ((int64_t{1} << kShareBits) - 1);
  const int64_t rounding = up ? (int64_t{1} << kShareBits) - 1 : 0;
  return high * share + ((low * share + rounding) >> kShareBits);
}

// No conversion of NaN or infinity is defined, and neither is a cover of them.
float finite(float mass) {
  return std::min(std::max(0.0f, mass), std::numeric_limits<float>::max());
}

// The cover of one group: masses [num], not negative. keys has room for as many; share is in units
// of 2^-kShareBits; is_floor: the longest prefix of at most that share, else the shortest of at
// least that share.
Cover find_cover(const float* masses, int64_t num, int64_t share, bool is_floor, uint32_t* keys) {
  int32_t top = 0;  // of bits, which order like masses
  for (int64_t t = 0; t < num; ++t) {
    keys[t] = std::bit_cast<uint32_t>(finite(masses[t]));
    top = std::max(top, static_cast<int32_t>(keys[t]));
  }
  int exponent;
  std::frexp(std::bit_cast<float>(top), &exponent);
  const double unit = std::ldexp(1.0, kUnitBits - exponent);
  const auto units = [unit](uint32_t key) {
    return static_cast<int64_t>(static_cast<double>(std::bit_cast<float>(key)) * unit);
  };

  constexpr int kBits = 11, kBins = 1 << kBits;
  // what is less than a unit moves no sum: a cover cannot end there
  const float one = std::ldexp(1.0f, exponent - kUnitBits);
  const uint32_t smallest = std::bit_cast<uint32_t>(one);
  int64_t count = 0;  // keys that share the known leading bits, first in `keys`
  for (int64_t i = 0; i < num; ++i) {
    keys[count] = keys[i];
    count += keys[i] >= smallest;
  }
  // units of larger keys; the cover ends where a sum reaches the goal
  int64_t above = 0, goal = -1;
  uint32_t bin = 0;
  for (const int shift : {20, 10, 0}) {
    std::array<int64_t, kBins> held{};
    const uint32_t mask = shift == 20 ? kBins - 1 : kBins / 2 - 1;
    for (int64_t i = 0; i < count; ++i) held[keys[i] >> shift & mask] += units(keys[i]);
    if (goal < 0) {
      int64_t total = 0;
      for (const int64_t part : held) total += part;
      // to exceed a share is to reach one unit more
      goal = part_of(total, share, !is_floor) + is_floor;
      if (total < goal) return kAll;
      if (goal == 0) return kNothing;
    }
    bin = mask;
    while (above + held[bin] < goal) above += held[bin--];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      keys[kept] = keys[i];
      kept += (keys[i] >> shift & mask) == bin;
    }
    count = kept;
  }
  const uint32_t key = keys[0];
  const int64_t each = units(key), reaching = (goal - above + each - 1) / each;
  const float least = std::bit_cast<float>(key);
  int64_t tie_end = 0;
  for (int64_t ties = is_floor ? reaching - 1 : reaching; ties > 0; ++tie_end) {
    ties -= finite(masses[tie_end]) == least;
  }
  return {least, tie_end};
}

at::Tensor cover_votes(const at::Tensor& masses, const at::Tensor& end, int64_t share,
                       bool is_floor) {
  TORCH_CHECK(masses.dim() == 4 && masses.scalar_type() == at::kFloat,
              "masses: expected float32 [N, Hkv, NG, T]");
  // sums of more units would not fit into 64 bits
  TORCH_CHECK(masses.size(3) <= int64_t{1} << 20, "masses: expected at most 2^20 tokens, got ",
              masses.size(3));
  TORCH_CHECK(end.scalar_type() == at::kLong, "end: expected int64");
  TORCH_CHECK(0 <= share && share <= int64_t{1} << kShareBits, "tau: expected 0 to 1");
  const at::Tensor x = masses.contiguous(), ends = end.contiguous();
  const int64_t num_heads = x.size(1), num_groups = x.size(2), length = x.size(3);
  const int64_t num_pairs = x.size(0) * num_heads, num_tiles = ceil_div(length, kTileTokens);
  auto votes = at::zeros({x.size(0), num_heads, length}, x.options());
  const float* mass = x.const_data_ptr<float>();
  float* out = votes.mutable_data_ptr<float>();
  const auto inside = [&](int64_t pair) {
    return std::clamp<int64_t>(ends.const_data_ptr<int64_t>()[pair / num_heads], 0, length);
  };

  std::vector<Cover> covers(num_pairs * num_groups);
  at::parallel_for(0, num_pairs * num_groups, grain_of(length), [&](int64_t begin, int64_t stop) {
    std::vector<uint32_t> keys(length);
    for (int64_t i = begin; i < stop; ++i) {
      covers[i] = find_cover(mass + i * length, inside(i / num_groups), share, is_floor,
                             keys.data());
    }
  });

  const int64_t grain = grain_of(num_groups * kTileTokens);
  at::parallel_for(0, num_pairs * num_tiles, grain, [&](int64_t begin, int64_t stop) {
    for (int64_t i = begin; i < stop; ++i) {
      const int64_t pair = i / num_tiles, first = i % num_tiles * kTileTokens;
      const int64_t last = std::min(first + kTileTokens, inside(pair));
      for (int64_t g = pair * num_groups; g < (pair + 1) * num_groups; ++g) {
        const float* row = mass + g * length;
        const float least = covers[g].least;
        const int64_t middle = std::clamp(covers[g].tie_end, first, std::max(first, last));
        for (int64_t t = first; t < middle; ++t) out[pair * length + t] += row[t] >= least;
        for (int64_t t = middle; t < last; ++t) out[pair * length + t] += row[t] > least;
      }
    }
  });
  return votes;
}

}  // namespace
}  // namespace kvcompress

TORCH_LIBRARY_FRAGMENT(vllm_kvcompress, m) {
  m.def("cover_votes(Tensor masses, Tensor end, int share, bool is_floor) -> Tensor",
        &kvcompress::cover_votes);
}
