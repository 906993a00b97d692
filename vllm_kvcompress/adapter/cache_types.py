# SPDX-License-Identifier: Apache-2.0
"""Types of a KV cache that can be compressed, by the names that vLLM gives them."""

import torch
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

FLOAT8_TYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Caches of bytes with one scale each for the keys and the values of a layer."""


def is_supported(cache_dtype: str) -> bool:
    """Whether a cached element is a number, up to a scale that all of its layer share."""
    return cache_dtype in FLOAT8_TYPES or not is_quantized_kv_cache(cache_dtype)
