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
from vllm_kvcompress.kernels import PageLayout


class CompressedCPUImpl(CompressedImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """CPU attention over natural prompts and virtual decode batches."""


class CompressedCPUBuilder(CompressedBuilder, CPUAttentionMetadataBuilder):
    """CPU metadata for both; the virtual one has G query heads and one KV head."""

    platform_backend = "CPU_ATTN"

    def make_virtual_builder(self, spec, vllm_config) -> CPUAttentionMetadataBuilder:
        builder = CPUAttentionMetadataBuilder(spec, self.layer_names, vllm_config, self.device)
        builder.num_heads = self.num_heads // self.num_kv_heads  # it counted the layers' own
        return builder

    def page_layout(self) -> PageLayout:
        return learn_layout(self.isa, self.dtype, self.block_size, self.head_dim)


class CompressedCPUBackend(CompressedBackend, CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CompressedCPUImpl]:
        return CompressedCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedCPUBuilder]:
        return CompressedCPUBuilder


@functools.cache
def learn_layout(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> PageLayout:
    """Where vLLM's CPU kernel keeps each element of a head page, found by asking it.

    Keys are stored transposed or packed, depending on the instruction set. The kernel writes
    numbered elements into a scratch page; where the numbers come out is the layout.
    """
    numel = block_size * head_size
    numbers = torch.arange(numel, dtype=torch.int32)
    codes = numbers.to(torch.int16).view(dtype) if dtype.itemsize == 2 else numbers.to(dtype)
    page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    key_page, value_page = page.chunk(2, dim=2)
    rows = codes.view(block_size, 1, head_size)
    slots = torch.arange(block_size)
    ops.cpu_attn_reshape_and_cache(rows, rows.clone(), key_page, value_page, slots, isa)
    index = []
    for part, offset in ((key_page, 0), (value_page, numel)):
        stored = part.reshape(-1)
        found = stored.view(torch.int16).long() & 0xFFFF if dtype.itemsize == 2 else stored.long()
        order = torch.empty(numel, dtype=torch.int64)
        order[found] = torch.arange(offset, offset + numel)
        assert torch.equal(found.sort().values, numbers.long()), "a page is not a permutation"
        index.append(order)
    return PageLayout(block_size, head_size, index[0], index[1])
