// SPDX-License-Identifier: Apache-2.0
#include "attention_tiles.h"

#ifdef KV_X86_KERNELS
#pragma GCC target("avx512f,avx512dq,fma")
#define KV_NAMESPACE avx512
#define KV_LANES 16
#include "attention_tiles.inc"
#endif
