// SPDX-License-Identifier: Apache-2.0
// Types of the elements of vLLM's CPU cache.

#pragma once

#include <ATen/Dispatch.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>

#include <array>
#include <cstdint>

// Runs the function that follows for the type of the cache, scalar_t.
#define KV_DISPATCH_ELEMENTS(TYPE, NAME, ...)                                                \
  AT_DISPATCH_FLOATING_TYPES_AND4(at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn,              \
                                  at::kFloat8_e5m2, TYPE, NAME, __VA_ARGS__)

namespace kvcompress {

template <typename T>
struct ToFloat {
  float operator()(T x) const { return static_cast<float>(x); }
};

// All 256 numbers of a float8 type: to look one up takes less than to put its bits together.
template <typename T>
class Float8Table {
 public:
  Float8Table() : numbers_(numbers().data()) {}

  float operator()(T x) const { return numbers_[x.x]; }

 private:
  static const std::array<float, 256>& numbers() {
    static const std::array<float, 256> all = [] {
      std::array<float, 256> made;
      for (int bits = 0; bits < 256; ++bits) {
        made[bits] = static_cast<float>(T(static_cast<uint8_t>(bits), T::from_bits()));
      }
      return made;
    }();
    return all;
  }

  const float* numbers_;
};

template <>
struct ToFloat<c10::Float8_e4m3fn> : Float8Table<c10::Float8_e4m3fn> {};

template <>
struct ToFloat<c10::Float8_e5m2> : Float8Table<c10::Float8_e5m2> {};

}  // namespace kvcompress
