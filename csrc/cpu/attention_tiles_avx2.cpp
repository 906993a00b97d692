// SPDX-License-Identifier: Apache-2.0
#include "attention_tiles.h"

#ifdef KV_X86_KERNELS
#pragma GCC target("avx2,fma")
#define KV_NAMESPACE avx2
#define KV_LANES 8
#include "attention_tiles.inc"
#endif
