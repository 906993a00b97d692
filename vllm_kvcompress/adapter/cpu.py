# SPDX-License-Identifier: Apache-2.0
"""Compression on vLLM's CPU attention backend."""

import functools

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_kvcompress.adapter.backend import CompressedBackend, CompressedImpl
from vllm_kvcompress.adapter.builder import CompressedBuilder
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES
from vllm_kvcompress.kernels import PageLayout


class CompressedCPUImpl(CompressedImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """CPU attention over uncompressed caches and per-head batches."""


class CompressedCPUBuilder(CompressedBuilder, CPUAttentionMetadataBuilder):
    """CPU metadata for both; a per-head sequence has G query heads and one KV head."""

    platform_backend = "CPU_ATTN"

    def make_per_head_builder(self, spec, vllm_config) -> CPUAttentionMetadataBuilder:
        builder = CPUAttentionMetadataBuilder(spec, self.layer_names, vllm_config, self.device)
        builder.num_heads = self.num_heads // self.num_kv_heads  # it counted the layers' own
        return builder

    def page_layout(self, head_size: int) -> PageLayout:
        return learn_layout(self.isa, self.dtype, self.block_size, head_size, self.kv_cache_dtype)


class CompressedCPUBackend(CompressedBackend, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CompressedCPUImpl]:
        return CompressedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedCPUBuilder]:
        return CompressedCPUBuilder


_DIGITS = 64
_FIRST_CODE = 8


@functools.cache
def learn_layout(
    isa: str, dtype: torch.dtype, block_size: int, head_size: int, cache_dtype: str = "auto"
) -> PageLayout:
    """Where vLLM's CPU kernel keeps each element of a head page, found by asking it.

    Keys are stored transposed or packed, depending on the instruction set. The kernel writes
    numbered elements into a scratch page; where the numbers come out is the layout. A float8 page
    has room for one digit of a number at a time.

    Args:
        isa, dtype: of the kernel, and of the keys and values that it is given.
        cache_dtype: as ``--kv-cache-dtype``.
    """
    numel = block_size * head_size
    numbers = torch.arange(numel)
    float8 = FLOAT8_TYPES.get(cache_dtype)
    # ascending numbers that any type of page holds exactly
    codes = torch.arange(_FIRST_CODE, _FIRST_CODE + _DIGITS, dtype=torch.uint8)
    codes = codes.view(float8 or torch.float8_e4m3fn).float()
    found = torch.zeros(2, numel, dtype=torch.int64)
    place = 1
    while place < numel:
        rows = codes[numbers // place % _DIGITS].to(dtype).view(block_size, 1, head_size)
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=torch.uint8 if float8 else dtype)
        key_page, value_page = page.chunk(2, dim=2)
        slots = torch.arange(block_size)
        ops.cpu_attn_reshape_and_cache(
            rows, rows.clone(), key_page, value_page, slots, isa, kv_cache_dtype=cache_dtype
        )
        stored = page.view(2, numel) if float8 is None else page.view(2, numel).view(float8)
        found += torch.searchsorted(codes, stored.float()) * place
        place *= _DIGITS
    index = []
    for part, offset in ((found[0], 0), (found[1], numel)):
        assert torch.equal(part.sort().values, numbers), "a page is not a permutation"
        order = torch.empty(numel, dtype=torch.int64)
        order[part] = torch.arange(offset, offset + numel)
        index.append(order)
    return PageLayout(block_size, head_size, *index)
