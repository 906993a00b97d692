// SPDX-License-Identifier: Apache-2.0
// The k largest of a row of scores: where they begin.

#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace kvcompress {

// Keys order like scores: both zeros are alike, and NaN is below -inf.
inline uint32_t order_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t key = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  return score == score ? key : 0u;
}

inline float score_of(uint32_t key) {
  return std::bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// The k largest keys are those above `key`, and `ties` of those equal to it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// Threshold of the k largest of `count` keys, 1 <= k <= count: radix selection, 11 bits at a time.
inline Threshold find_threshold(const uint32_t* keys, int64_t count, int64_t k) {
  constexpr int kBits = 11, kBins = 1 << kBits;
  uint32_t prefix = 0, known = 0;  // leading bits of the threshold, and which bits those are
  for (const int shift : {21, 10, 0}) {
    std::array<int64_t, kBins> histogram{};
    const uint32_t mask = shift == 0 ? (1u << 10) - 1 : kBins - 1;
    for (int64_t i = 0; i < count; ++i) {
      if ((keys[i] & known) == prefix) ++histogram[keys[i] >> shift & mask];
    }
    uint32_t bin = mask;
    while (k > histogram[bin]) k -= histogram[bin--];
    prefix |= bin << shift;
    known |= mask << shift;
  }
  return {prefix, k};
}

}  // namespace kvcompress
