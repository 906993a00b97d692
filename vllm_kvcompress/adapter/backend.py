# SPDX-License-Identifier: Apache-2.0
"""The backend and the attention implementation of a compressing layer, on every platform."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_kvcompress.adapter import compatibility
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.metadata import CompressedMetadata, TokenIndex
from vllm_kvcompress.kernels import as_bytes

if TYPE_CHECKING:
    from vllm_kvcompress.adapter.layers import CompressedLayers


class CompressedBackend:
    """Mixin of a platform's ``AttentionBackend``; only layers of a compressing engine get it.

    Attributes:
        extra: fields of ``CompressedSpec`` that depend on the engine; set by the subclass that
            ``selection`` makes for it.
    """

    extra: ClassVar[Mapping[str, Any]]

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec=None) -> list[int | MultipleOf]:
        """One size, into which vLLM splits larger blocks: budgets need small head pages.

        A backend that does not take it has its own way, and the worker checks what came of it.
        """
        sizes = super().get_supported_kernel_block_sizes(kv_cache_spec)  # type: ignore[misc]
        wanted = cls.extra["kernel_block_size"]
        bases = [size.base for size in sizes if isinstance(size, MultipleOf)]
        return [wanted] if any(wanted % base == 0 for base in bases) else sizes

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost with heads before tokens: the layout that has head pages."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec):
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if type(spec) is not FullAttentionSpec:
            return spec
        return CompressedSpec.of(spec, **cls.extra)


class _AttentionLayer(Protocol):
    """A layer of vLLM; its scales are those of a float8 cache."""

    layer_name: str
    _q_scale_float: float
    _k_scale_float: float
    _v_scale_float: float


class CompressedImpl:
    """Mixin of a platform's ``AttentionImpl``."""

    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    scale: float
    logits_soft_cap: float
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None
    layers: "CompressedLayers | None" = None
    """Shared by all compressed layers; set by the first metadata builder."""
    _per_head: "CompressedImpl | None" = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        compatibility.check_layer(self)  # type: ignore[arg-type]

    def forward(
        self,
        layer: _AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, and keep what the compression of unfinished prompts will need.

        Args:
            query: [tokens, Hq, D]; the layer's K and V are in the cache already. Where the kernel
                attends in float8, vLLM has brought it to that type.
            kv_cache: [num_blocks, Hkv, block_size, 2 * D].
            output: [tokens, Hq, D], written.
        """
        stock = super().forward  # type: ignore[misc]
        if not isinstance(attn_metadata, CompressedMetadata):
            return stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        meta = attn_metadata
        if meta.prefill is not None and meta.prefill_tokens is None:
            stock(layer, query, key, value, kv_cache, meta.prefill, output)
            if meta.queries is None and not meta.stats:
                return output
        queries = query.view(-1, self.num_heads, self.head_size)
        result = output.view(-1, self.num_heads, self.head_size)
        if meta.prefill_tokens is not None:
            chosen = _take(queries, meta.prefill_tokens)
            part = result[meta.prefill_tokens]  # written, or copied and written back
            stock(layer, chosen, None, None, kv_cache, meta.prefill, part)
            if not isinstance(meta.prefill_tokens, slice):
                result[meta.prefill_tokens] = part
        if meta.per_head is not None:
            self._attend_per_head(layer, queries, kv_cache, meta, result)
        if meta.queries is not None or meta.stats:
            self._keep(layer, queries, meta, output.dtype)
        return output

    def _keep(
        self,
        layer: _AttentionLayer,
        queries: torch.Tensor,
        meta: CompressedMetadata,
        dtype: torch.dtype,
    ) -> None:
        """``dtype``: of the model. Layers that read another's cache leave nothing behind."""
        if self.kv_sharing_target_layer_name is not None:
            return
        layers = self.layers
        assert layers is not None
        layer_idx = layers.facts.position_of[layer.layer_name]
        if meta.queries is not None:
            layers.waiting.keep_queries(layer_idx, queries, *meta.queries)
        if meta.stats:
            numbers = _as_numbers(queries, layer, dtype)
            for needs, rows in meta.stats:
                layers.waiting.keep_stats(layer_idx, needs, rows, numbers)

    def _attend_per_head(
        self,
        layer: _AttentionLayer,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: CompressedMetadata,
        result: torch.Tensor,
    ) -> None:
        if self._per_head is None:  # the platform's own impl, for one KV head and its query heads
            self._per_head = copy.copy(self)
            self._per_head.num_heads = self.num_queries_per_kv
            self._per_head.num_kv_heads = 1
        batch, layers = meta.per_head, self.layers
        assert batch is not None
        assert layers is not None
        group, head_size = self.num_queries_per_kv, self.head_size
        stock_meta = batch.metadata_of(layers.facts.position_of[layer.layer_name])
        # where budgets are uniform, ids count from the layer's own pages
        pages = kv_cache if layers.uniform else layers.facts.pages.pages
        pages = pages.view(-1, 1, *kv_cache.shape[2:])
        rows = _take(queries, batch.tokens).reshape(-1, group, head_size)
        part = result[batch.tokens]
        out = part.view(-1, group, head_size)
        if batch.order is not None:
            ordered = torch.empty_like(out)
            rows = _take(rows, batch.order)
            self._per_head.forward(layer, rows, None, None, pages, stock_meta, ordered)
            out[batch.order] = ordered
        elif batch.query_len > 1:
            by_token = out.view(-1, batch.query_len, self.num_kv_heads, group, head_size)
            by_head = rows.view(by_token.shape).transpose(1, 2).contiguous()
            ordered = torch.empty_like(out)
            flat = by_head.view(rows.shape)
            self._per_head.forward(layer, flat, None, None, pages, stock_meta, ordered)
            by_token.copy_(ordered.view(by_head.shape).transpose(1, 2))
        else:
            self._per_head.forward(layer, rows, None, None, pages, stock_meta, out)
        if not isinstance(batch.tokens, slice):
            result[batch.tokens] = part


def _take(rows: torch.Tensor, index: TokenIndex) -> torch.Tensor:
    return as_bytes(rows)[index].view(rows.dtype)


def _as_numbers(queries: torch.Tensor, layer: _AttentionLayer, dtype: torch.dtype) -> torch.Tensor:
    """Queries that the attention kernel gets in float8, as it understands them."""
    if queries.dtype.itemsize > 1:
        return queries
    return queries.to(dtype) * layer._q_scale_float


def compressed_modules(vllm_config: VllmConfig) -> list[Attention]:
    """The compressed attention layers of an engine's worker, once its model is built.

    Layers that read the cache of one of them are not among them.
    """
    return [
        module
        for module in vllm_config.compilation_config.static_forward_context.values()
        if isinstance(module, Attention)
        and isinstance(module.impl, CompressedImpl)
        and module.kv_sharing_target_layer_name is None
    ]


def layers_of(vllm_config: VllmConfig) -> "CompressedLayers":
    """What the compressed layers of an engine's worker share, once its KV cache is initialized."""
    impl = compressed_modules(vllm_config)[0].impl
    assert isinstance(impl, CompressedImpl)
    assert impl.layers is not None, "the metadata builder has made it"
    return impl.layers
