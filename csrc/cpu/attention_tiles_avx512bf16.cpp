// SPDX-License-Identifier: Apache-2.0
#include "attention_tiles.h"

#ifdef KV_X86_KERNELS
#pragma GCC target("avx512f,avx512dq,avx512bf16,fma")
#define KV_NAMESPACE avx512bf16
#define KV_LANES 16
#define KV_PAIRS
#include "attention_tiles.inc"
#endif
