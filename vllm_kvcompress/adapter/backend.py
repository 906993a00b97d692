# SPDX-License-Identifier: Apache-2.0
"""The backend and the attention implementation of a compressing layer, on every platform."""

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_kvcompress.adapter import attention_inputs, refusals
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.metadata import CompressedMetadata
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.kernels import PromptPages, as_bytes
from vllm_kvcompress.pipeline import LayerInputs
from vllm_kvcompress.prefill_stats import SumRows
from vllm_kvcompress.scoring import Need

if TYPE_CHECKING:
    from vllm_kvcompress.adapter.builder import CompressedBuilder


class CompressedBackend:
    """Mixin of a platform's ``AttentionBackend``; only layers of a compressing engine get it.

    Attributes:
        settings, model_kv_heads: of the engine (see ``CompressedSpec``); set by the subclass that
            ``selection`` makes for it.
    """

    settings: ClassVar[str]
    model_kv_heads: ClassVar[int]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost with heads before tokens: the layout that has head pages."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec):
        spec = super().customize_spec(spec)  # type: ignore[misc]
        if type(spec) is not FullAttentionSpec:
            return spec
        return CompressedSpec.of(spec, settings=cls.settings, model_kv_heads=cls.model_kv_heads)


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
    _per_head: "CompressedImpl | None" = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        reasons = refusals.layer_reasons(
            sinks=self.sinks is not None,  # type: ignore[attr-defined]
            alibi=self.alibi_slopes is not None,  # type: ignore[attr-defined]
            kv_sharing=self.kv_sharing_target_layer_name is not None,  # type: ignore[attr-defined]
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if reasons:
            raise KVCompressionError.from_reasons(reasons)
        self._float8 = FLOAT8_TYPES.get(self.kv_cache_dtype)

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
        queries = query.view(-1, self.num_heads, self.head_size)
        result = output.view(-1, self.num_heads, self.head_size)
        if meta.natural is not None and meta.natural_tokens is None:
            stock(layer, query, key, value, kv_cache, meta.natural, output)
        elif meta.natural_tokens is not None:
            part = torch.empty_like(result[: meta.natural.num_actual_tokens])
            stock(
                layer, _take(queries, meta.natural_tokens), None, None, kv_cache, meta.natural, part
            )
            result[meta.natural_tokens] = part
        if meta.queries is not None or meta.sums is not None:
            self._compress(layer, queries, kv_cache, meta, output.dtype)
        if meta.virtual is not None:
            self._attend_virtual(layer, queries, kv_cache, meta, result)
        return output

    def _compress(
        self,
        layer: _AttentionLayer,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: CompressedMetadata,
        dtype: torch.dtype,
    ) -> None:
        """``dtype``: of the model."""
        builder, moved, ending = meta.builder, meta.queries, meta.ending
        row = builder.layer_rows[layer.layer_name]
        movable = as_bytes(queries)
        with builder.telemetry.layer():
            sums = self._add_sums(layer, row, queries, kv_cache, meta, dtype)
            if moved is not None and moved.save is not None:
                request, store_row, token = moved.save
                builder.stored_queries(movable)[request, row, store_row] = movable[token]
            if ending is None:
                return
            assert moved is not None
            assert moved.tokens is not None
            last_queries = movable[moved.tokens]  # [N, Q, Hq, D]
            if moved.load is not None:
                entry, column, request, store_row = moved.load
                stored = builder.stored_queries(movable)
                last_queries[entry, column] = stored[request, row, store_row]
            key_scale, value_scale = self._scales(layer)
            inputs = LayerInputs(
                layer=builder.layer_indices[layer.layer_name],
                row=row,
                queries=_as_numbers(last_queries.view(queries.dtype), layer, dtype),
                pages=self._typed(_as_pages(kv_cache)),
                scale=self.scale,
                softcap=self.logits_soft_cap,
                key_scale=key_scale,
                value_scale=value_scale,
                **sums,
            )
            all_pages, layer_pages = builder.span()
            if all_pages is not None:
                all_pages = self._typed(all_pages)
            count = builder.pipeline.compress(ending, inputs, all_pages, layer_pages)
            if count is not None:
                builder.telemetry.record_pages(count)
        if layer.layer_name == builder.last_layer:
            pages = len(builder.layer_rows) * self.num_kv_heads
            builder.telemetry.end_step(builder.block_size / pages, meta.tail_tokens)

    def _add_sums(
        self,
        layer: _AttentionLayer,
        row: int,
        queries: torch.Tensor,
        kv_cache: torch.Tensor,
        meta: CompressedMetadata,
        dtype: torch.dtype,
    ) -> dict[str, Any]:
        """Take this step's rows into the sums over the prompt; the totals of those that end."""
        builder, rows, sums = meta.builder, meta.sums, meta.builder.sums
        found: dict[str, Any] = {}
        if rows is None:
            return found
        if Need.KEY_ATTENTION_SUMS in sums.needs:
            pages = self._typed(_as_pages(kv_cache))
            layout = builder.pipeline.layout._replace(key_scale=self._scales(layer)[0])
            prompts = PromptPages(pages, rows.block_table, self.num_kv_heads, layout)
            queries = _as_numbers(queries, layer, dtype)
            total = sums.add_columns(rows, row, queries, prompts, self.scale, self.logits_soft_cap)
            if meta.ending is not None:
                length = meta.ending.block_table.shape[1] * builder.block_size
                found["key_attention_sum"] = total[:, :, :length]
        if sums.needs & attention_inputs.CAPTURED:
            inputs = attention_inputs.inputs_of(builder.layers[row])
            found.update(self._add_moments(builder, row, inputs, rows))
        return found

    def _add_moments(
        self,
        builder: "CompressedBuilder",
        row: int,
        inputs: attention_inputs.AttentionInputs,
        rows: SumRows,
    ) -> dict[str, Any]:
        """Moments of what goes into the layer before RoPE, and the way to make more of it."""
        sums = builder.sums
        found: dict[str, Any] = {}
        if Need.HIDDEN_MOMENTS in sums.needs:
            found["hidden"] = sums.add_hidden(rows, row, inputs.hidden)
        if Need.QUERY_MOMENTS in sums.needs:
            queries = inputs.queries.view(-1, self.num_heads, self.head_size)
            found["moments"] = sums.add_queries(rows, row, queries)
        last = inputs.positions[rows.tokens[rows.ending, -1]].amax(1)
        found["projector"] = attention_inputs.LayerQueryProjector(
            inputs, last, self.num_heads, self.head_size
        )
        return found

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
        all_pages, _ = meta.builder.span()
        pages = _as_pages(kv_cache) if all_pages is None else all_pages
        pages = pages.view(-1, 1, *kv_cache.shape[2:])
        if virtual.order is None:
            num_tokens = meta.num_actual_tokens
            rows = queries[:num_tokens].reshape(-1, group, head_size)
            out = result[:num_tokens].view(-1, group, head_size)
            self._per_head.forward(layer, rows, None, None, pages, stock_meta, out)
            return
        rows = _take(queries.reshape(-1, group, head_size), virtual.order)
        out = torch.empty_like(rows, dtype=result.dtype)
        self._per_head.forward(layer, rows, None, None, pages, stock_meta, out)
        result.view(-1, group, head_size)[virtual.order] = out

    def _typed(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages of a float8 cache, which vLLM allocates as bytes, in their type."""
        return pages if self._float8 is None else pages.view(self._float8)

    def _scales(self, layer: _AttentionLayer) -> tuple[float, float]:
        """Of keys and of values. vLLM has them on the host, too: nothing waits for the device."""
        if self._float8 is None:
            return 1.0, 1.0
        return layer._k_scale_float, layer._v_scale_float


def _take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return as_bytes(rows)[index].view(rows.dtype)


def _as_numbers(queries: torch.Tensor, layer: _AttentionLayer, dtype: torch.dtype) -> torch.Tensor:
    """Queries that the attention kernel gets in float8, as it understands them."""
    if queries.dtype.itemsize > 1:
        return queries
    return queries.to(dtype) * layer._q_scale_float


def _as_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """[num_blocks, Hkv, block_size, 2 * D] as head pages [num_blocks * Hkv, block_size * 2 * D]."""
    return kv_cache.view(-1, kv_cache.shape[2] * kv_cache.shape[3])
