# SPDX-License-Identifier: Apache-2.0
"""The backend and the attention implementation of a compressing layer, on every platform."""

import copy
from typing import Any, ClassVar, Protocol

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_kvcompress.adapter import refusals
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.metadata import CompressedMetadata
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError


class CompressedBackend:
    """Mixin of a platform's ``AttentionBackend``; only layers of a compressing engine get it.

    Attributes:
        settings: of the engine; set by the subclass that ``selection`` makes for it.
    """

    settings: ClassVar[KVCompressionConfig]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost with heads before tokens: the layout that has head pages."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec):
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if type(spec) is not FullAttentionSpec:
            return spec
        return CompressedSpec.of(
            spec,
            window=cls.settings.window,
            budget_tokens=cls.settings.budget.tokens,
            budget_ratio=cls.settings.budget.ratio,
        )


class _AttentionLayer(Protocol):
    layer_name: str


class CompressedImpl:
    """Mixin of a platform's ``AttentionImpl``."""

    num_heads: int
    num_kv_heads: int
    num_queries_per_kv: int
    head_size: int
    scale: float
    logits_soft_cap: float
    _per_head: "CompressedImpl | None" = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        reasons = refusals.layer_reasons(
            sinks=self.sinks is not None,  # type: ignore[attr-defined]
            alibi=self.alibi_slopes is not None,  # type: ignore[attr-defined]
            kv_sharing=self.kv_sharing_target_layer_name is not None,  # type: ignore[attr-defined]
            kv_cache_dtype=self.kv_cache_dtype,  # type: ignore[attr-defined]
        )
        if reasons:
            raise KVCompressionError.from_reasons(reasons)

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
        """Attend; then, where prompts end, compress this layer.

        Args:
            query: [tokens, Hq, D]; the layer's K and V are in the cache already.
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
        queries = query.view(-1, self.num_heads, self.head_size)
        result = output.view(-1, self.num_heads, self.head_size)
        if meta.natural is not None and meta.natural_tokens is None:
            stock(layer, query, key, value, kv_cache, meta.natural, output)
        elif meta.natural is not None:
            part = torch.empty_like(result[: meta.natural.num_actual_tokens])
            stock(layer, queries[meta.natural_tokens], None, None, kv_cache, meta.natural, part)
            result[meta.natural_tokens] = part
        if meta.windows is not None:
            self._compress(layer, queries, kv_cache, meta)
        if meta.virtual is not None:
            self._attend_virtual(layer, queries, kv_cache, meta, result)
        return output

    def _compress(
        self,
        layer: _AttentionLayer,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: CompressedMetadata,
    ) -> None:
        builder, windows, ending = meta.builder, meta.windows, meta.ending
        assert windows is not None
        row = builder.layer_rows[layer.layer_name]
        if windows.save is not None:
            store_row, window_row, token = windows.save
            builder.window_store.reserve(queries)[store_row, row, window_row] = queries[token]
        if ending is None:
            return
        with builder.telemetry.layer():
            window_queries = queries[windows.tokens]  # [N, W, Hq, D]
            if windows.load is not None:
                entry, window_row, store_row = windows.load
                stored = builder.window_store.reserve(queries)
                window_queries[entry, window_row] = stored[store_row, row, window_row]
            count = builder.pipeline.compress(
                ending,
                0 if builder.even else row,
                builder.layer_indices[layer.layer_name],
                window_queries,
                kv_cache.view(-1, kv_cache.shape[2] * kv_cache.shape[3]),
                self.num_kv_heads,
                self.scale,
                self.logits_soft_cap,
            )
            builder.telemetry.record_pages(count)
        if layer.layer_name == builder.last_layer:
            pages = len(builder.layer_rows) * self.num_kv_heads
            builder.telemetry.end_step(builder.block_size / pages, meta.tail_tokens)

    def _attend_virtual(
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
        virtual = meta.virtual
        assert virtual is not None
        group, head_size = self.num_queries_per_kv, self.head_size
        stock_meta = meta.builder.virtual_metadata(
            virtual, meta.builder.layer_rows[layer.layer_name]
        )
        num_blocks, num_heads, block_size, width = kv_cache.shape
        pages = kv_cache.view(num_blocks * num_heads, 1, block_size, width)
        if virtual.order is None:
            num_tokens = meta.num_actual_tokens
            rows = queries[:num_tokens].reshape(-1, group, head_size)
            out = result[:num_tokens].view(-1, group, head_size)
            self._per_head.forward(layer, rows, None, None, pages, stock_meta, out)
            return
        rows = queries.reshape(-1, group, head_size)[virtual.order]
        out = torch.empty_like(rows)
        self._per_head.forward(layer, rows, None, None, pages, stock_meta, out)
        result.view(-1, group, head_size)[virtual.order] = out
