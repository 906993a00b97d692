# SPDX-License-Identifier: Apache-2.0
"""Compression on vLLM's Triton attention backend (any GPU), full graphs included."""

import copy

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvcompress.adapter.backend import CompressedBackend, CompressedImpl
from vllm_kvcompress.adapter.replayed import ReplayedBuilder


class CompressedTritonImpl(CompressedImpl, TritonAttentionImpl):  # type: ignore[misc]
    """Triton attention over uncompressed caches and per-head batches."""

    def fused_output_quant_supported(self, quant_key) -> bool:
        """No: parts of a batch are put together as numbers."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """No: methods may look at what goes into RoPE."""
        return False


class CompressedTritonBuilder(ReplayedBuilder, TritonAttentionMetadataBuilder):
    """Triton metadata for both."""

    platform_backend = "TRITON_ATTN"

    def make_per_head_builder(self, spec, vllm_config) -> TritonAttentionMetadataBuilder:
        """A builder for a model of one KV head and its query heads.

        It sizes its scratch, and decides up to how many sequences it divides each of them among
        programs, by what the model's configuration says and the batches that graphs are made of.
        """
        group = self.num_heads_q // self.num_kv_heads
        scaled = copy.copy(vllm_config)
        scaled.model_config = copy.copy(vllm_config.model_config)
        vars(scaled.model_config).update(
            get_num_attention_heads=lambda parallel_config: group,
            get_num_kv_heads=lambda parallel_config: 1,
            get_head_size=lambda: spec.head_size,
        )
        scaled.compilation_config = copy.copy(vllm_config.compilation_config)
        sizes = scaled.compilation_config.cudagraph_capture_sizes or []
        scaled.compilation_config.cudagraph_capture_sizes = [
            size * self.num_kv_heads for size in sizes
        ]
        # by their names it would find the query heads of whole layers
        return TritonAttentionMetadataBuilder(spec, [], scaled, self.device)

    def build_for_cudagraph_capture(self, cam: CommonAttentionMetadata):
        cam.seq_lens.fill_(1)  # else making a graph takes long, see the base class
        return super().build_for_cudagraph_capture(cam)


class CompressedTritonBackend(CompressedBackend, TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CompressedTritonImpl]:
        return CompressedTritonImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedTritonBuilder]:
        return CompressedTritonBuilder
