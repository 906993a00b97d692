// SPDX-License-Identifier: Apache-2.0
// Floats that vectors of 64 bytes are read from without crossing a line of the cache.

#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace kvcompress {

template <typename T>
struct LineAllocator {
  using value_type = T;

  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), kLine));
  }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }

  bool operator==(const LineAllocator&) const { return true; }

 private:
  static constexpr std::align_val_t kLine{64};
};

using AlignedFloats = std::vector<float, LineAllocator<float>>;

}  // namespace kvcompress
