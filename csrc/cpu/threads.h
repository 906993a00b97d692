// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace kvcompress {

// Grain of at::parallel_for over items of so many elements: less than 2^15 are not worth a thread.
inline int64_t grain_of(int64_t elements) {
  return (int64_t{1} << 15) / std::max<int64_t>(elements, 1) + 1;
}

}  // namespace kvcompress
