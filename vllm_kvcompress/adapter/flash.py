# SPDX-License-Identifier: Apache-2.0
"""Compression on vLLM's FlashAttention backend (CUDA), full graphs included."""

import copy

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_kvcompress.adapter.backend import CompressedBackend, CompressedImpl
from vllm_kvcompress.adapter.replayed import ReplayedBuilder


class CompressedFlashImpl(CompressedImpl, FlashAttentionImpl):  # type: ignore[misc]
    """FlashAttention over uncompressed caches and per-head batches."""


class CompressedFlashBuilder(ReplayedBuilder, FlashAttentionMetadataBuilder):
    """FlashAttention metadata for both."""

    platform_backend = "FLASH_ATTN"

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


class CompressedFlashBackend(CompressedBackend, FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CompressedFlashImpl]:
        return CompressedFlashImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedFlashBuilder]:
        return CompressedFlashBuilder
