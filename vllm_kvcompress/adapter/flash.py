# SPDX-License-Identifier: Apache-2.0
"""Compression on vLLM's FlashAttention backend (CUDA), full graphs included."""

import copy

import torch
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_kvcompress.adapter.backend import CompressedBackend, CompressedImpl
from vllm_kvcompress.adapter.builder import CompressedBuilder
from vllm_kvcompress.kernels import PageLayout


class CompressedFlashImpl(CompressedImpl, FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention over uncompressed caches and per-head batches."""


class CompressedFlashBuilder(CompressedBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention metadata for both.

    Full graphs are captured as per-head batches. They read per-step tensors at fixed addresses: the
    buffers made here, page tables, and vLLM's own block tables and sequence lengths.
    """

    platform_backend = "FLASH_ATTN"

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        num_reqs, num_seqs = self.max_num_seqs, self.max_num_seqs * self.num_kv_heads
        empty = torch.zeros
        self._static = {
            "slots": empty(num_reqs, dtype=torch.int64, device=device),
            "starts": empty(num_seqs + 1, dtype=torch.int32, device=device),
        }

    def static_buffer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        buffer = self._static[name][: value.shape[0]]
        buffer.copy_(value)
        return buffer

    def make_per_head_builder(self, spec, vllm_config) -> FlashAttentionMetadataBuilder:
        scaled = copy.copy(vllm_config)  # sizes of FlashAttention's own buffers
        scaled.scheduler_config = copy.copy(vllm_config.scheduler_config)
        scaled.compilation_config = copy.copy(vllm_config.compilation_config)
        scaled.scheduler_config.max_num_seqs *= self.num_kv_heads
        if scaled.compilation_config.max_cudagraph_capture_size is not None:
            scaled.compilation_config.max_cudagraph_capture_size *= self.num_kv_heads
        builder = FlashAttentionMetadataBuilder(spec, self.layer_names, scaled, self.device)
        builder.num_heads_q = self.num_heads_q // self.num_kv_heads  # it counted the layers' own
        return builder

    def page_layout(self) -> PageLayout:
        return PageLayout(self.block_size, self.headdim)


class CompressedFlashBackend(CompressedBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CompressedFlashImpl]:
        return CompressedFlashImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedFlashBuilder]:
        return CompressedFlashBuilder
