// SPDX-License-Identifier: Apache-2.0
// The portable kernels, and the choice of a set: by what torch finds, or ATEN_CPU_CAPABILITY says.
#include "attention_tiles.h"

#include <ATen/Version.h>

#include <string>

#define KV_NAMESPACE portable
#define KV_LANES 4
#include "attention_tiles.inc"

namespace kvcompress {

#ifdef KV_X86_KERNELS
namespace avx2 {
extern const TileKernels kernels;
}
namespace avx512 {
extern const TileKernels kernels;
}
namespace avx512bf16 {
extern const TileKernels kernels;
}
#endif

const TileKernels& tile_kernels() {
#ifdef KV_X86_KERNELS
  static const std::string capability = at::get_cpu_capability();
  static const bool has_pairs = __builtin_cpu_supports("avx512bf16");
  if (capability == "AVX512" && has_pairs) return avx512bf16::kernels;
  if (capability == "AVX512") return avx512::kernels;
  if (capability == "AVX2") return avx2::kernels;
#endif
  return portable::kernels;
}

}  // namespace kvcompress
