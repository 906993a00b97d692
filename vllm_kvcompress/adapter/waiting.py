# SPDX-License-Identifier: Apache-2.0
"""What prompts leave behind while they are computed, until they are compressed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.adapter import attention_inputs, output_weights
from vllm_kvcompress.adapter.layer_facts import LayerFacts
from vllm_kvcompress.kernels import PromptPages, as_bytes
from vllm_kvcompress.pipeline import LayerStack
from vllm_kvcompress.prefill_stats import PrefillStats, StatsRows
from vllm_kvcompress.request_slots import RequestSlots
from vllm_kvcompress.scoring import Need

_QUERIES = Need.WINDOW_QUERIES | Need.INSTRUCTION_QUERIES | Need.LAST_QUERY


def bytes_per_layer(
    needs: Need,
    max_rows: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    hidden_size: int,
    max_length: int,
    element_size: int,
) -> int:
    """What one layer keeps of a prompt, in bytes.

    Args:
        needs, max_rows: of all methods that prompts may have.
    """
    count = 0
    if needs & _QUERIES:
        count += max_rows * num_heads * head_size * element_size
    if Need.KEY_ATTENTION_SUMS in needs:
        count += num_kv_heads * max_length * 4
    if Need.HIDDEN_MOMENTS in needs:
        count += 4 * hidden_size * 4
    if Need.QUERY_MOMENTS in needs:
        count += num_heads * head_size * (head_size + 2) * 4
    return count


class WaitingPrompts:
    """Queries and statistics of prompts, by entry.

    The scheduler sees to it that there are never more prompts than entries.

    Args:
        facts: of the layers.
        needs, max_rows: what is kept, of all methods that prompts may have.
        num_entries: most prompts at a time.
        max_length: of a prompt, in tokens.
    """

    def __init__(
        self, facts: LayerFacts, needs: Need, max_rows: int, num_entries: int, max_length: int
    ) -> None:
        self.facts, self.needs, self.max_rows = facts, needs, max_rows
        self.num_entries = num_entries
        self.entries = RequestSlots(num_entries)
        self.stats = PrefillStats(len(facts), num_entries, max_length, needs)
        self._queries: torch.Tensor | None = None  # [L, entries * rows, Hq, D]
        self._rotating = 0  # a layer that rotates, if any does: it knows positions
        if needs & attention_inputs.CAPTURED:
            rotates = [attention_inputs.inputs_of(m).rotary_emb is not None for m in facts.modules]
            self._rotating = rotates.index(True) if any(rotates) else 0

    def entries_of(self, req_ids: Sequence[str]) -> np.ndarray:
        """Entries [len(req_ids)] int64 of requests; those that have none get one."""
        fresh = self.entries.assign(dict.fromkeys(req_ids))
        if fresh.size:
            self.stats.clear(self.facts.upload(fresh))
        return self.entries.of(req_ids)

    def release(self, req_ids: Sequence[str]) -> None:
        """Nothing of these requests is needed any more."""
        self.entries.release(req_ids)

    def places(
        self, req_ids: Sequence[str], distance: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        """Where a layer keeps the first query of a run, whose others follow.

        Args:
            distance: of each run's last query from the prompt's last token.
            length: queries of each run.
        """
        return (self.entries_of(req_ids) + 1) * self.max_rows - distance - length

    def keep_queries(
        self,
        layer_idx: int,
        queries: torch.Tensor,
        source: slice | torch.Tensor,
        target: slice | torch.Tensor,
    ) -> None:
        """Copy queries [tokens, Hq, D] of the batch tokens ``source`` to the places ``target``."""
        if self._queries is None:
            num_places = self.num_entries * self.max_rows
            self._queries = queries.new_zeros((len(self.facts), num_places, *queries.shape[1:]))
        as_bytes(self._queries)[layer_idx][target] = as_bytes(queries)[source]

    def keep_stats(
        self, layer_idx: int, needs: Need, rows: StatsRows, queries: torch.Tensor
    ) -> None:
        """Take a layer's tokens of this step into the statistics of their prompts.

        Args:
            needs: what is summed over these prompts.
            queries: [tokens, Hq, D] of the batch, after norm and RoPE, as numbers.
        """
        facts, stats = self.facts, self.stats
        module = facts.modules[layer_idx]
        if Need.KEY_ATTENTION_SUMS in needs:
            cache, num = module.kv_cache, len(rows.entries)
            key_scale = None
            if facts.float8 is not None:
                key_scale = facts.float8_scales["key"][layer_idx].expand(num)
            prompts = PromptPages(
                facts.typed(cache.view(-1, cache.shape[2] * cache.shape[3])),
                rows.block_table,
                facts.num_kv_heads,
                facts.layout,
                key_scale,
            )
            scale = facts.scale[layer_idx].expand(num)
            stats.add_keys(rows, layer_idx, queries, prompts, scale, facts.softcap)
        if needs & attention_inputs.CAPTURED:
            inputs = attention_inputs.inputs_of(module)
            if Need.HIDDEN_MOMENTS in needs:
                stats.add_hidden(rows, layer_idx, inputs.hidden)
            if Need.QUERY_MOMENTS in needs:
                if inputs.rotary_emb is not None:
                    queries = inputs.queries.unflatten(1, (facts.num_heads, -1))
                stats.add_queries(rows, layer_idx, queries)
            if layer_idx == self._rotating:  # the same in all layers
                stats.set_positions(rows, inputs.positions)

    def stack(
        self,
        req_ids: Sequence[str],
        needs: Need,
        num_rows: int,
        adapter_slots: torch.Tensor | None = None,
    ) -> LayerStack:
        """All that the layers hand over for N finished prompts.

        Args:
            needs: of their method.
            num_rows: Q, last positions whose queries are looked at.
            adapter_slots: [N], see ``lora.RequestAdapters.slots``; None without adapters.
        """
        facts = self.facts
        pages, layer_pages = facts.pages
        extra: dict[str, Any] = {}
        shape = (len(facts), len(req_ids), 0, facts.num_heads, facts.layout.head_size)
        queries = torch.empty(shape, dtype=facts.dtype, device=facts.device)
        if num_rows or needs.statistics:
            entries = facts.upload(self.entries_of(req_ids))
        if num_rows:
            queries = self._kept_queries(entries, num_rows)
        if needs.statistics:
            extra = self.stats.totals(entries, needs)
        if needs & attention_inputs.CAPTURED:
            extra["projector"] = attention_inputs.StackProjector(
                [attention_inputs.inputs_of(module) for module in facts.modules],
                self.stats.last_positions(entries),
                facts.num_heads,
                facts.layout.head_size,
                adapter_slots,
            )
        if Need.OUTPUT_GRAMS in needs:
            extra["output_grams"] = output_weights.grams_of(facts.modules)
        if facts.float8 is not None:
            extra["key_scale"] = facts.float8_scales["key"]
            extra["value_scale"] = facts.float8_scales["value"]
        return LayerStack(
            layers=facts.layer_indices,
            queries=queries,
            pages=facts.typed(pages),
            layer_pages=layer_pages,
            scale=facts.scale,
            softcap=facts.softcap,
            **extra,
        )

    def _kept_queries(self, entries: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[L, N, Q, Hq, D] of the last Q positions, in the order of positions."""
        store = self._queries
        assert store is not None, "queries were kept while the prompts were computed"
        by_entry = as_bytes(store).unflatten(1, (self.num_entries, self.max_rows))
        kept = by_entry[:, :, -num_rows:][:, entries].view(store.dtype)
        if kept.dtype.itemsize > 1:
            return kept
        # the attention kernel takes float8 queries
        scale = self.facts.float8_scales["query"].to(self.facts.dtype)
        return kept.to(self.facts.dtype) * scale[:, None, None, None, None]

    def fill_for_warm_up(self, req_id: str) -> None:
        """Let a made-up prompt leave zeros behind."""
        facts, zero = self.facts, torch.zeros(1, dtype=torch.int64, device=self.facts.device)
        shape = (1, facts.num_heads, facts.layout.head_size)
        queries = torch.zeros(shape, dtype=facts.dtype, device=facts.device)
        if self.needs & _QUERIES:
            self.keep_queries(0, queries, slice(0, 1), slice(0, 1))
        statistics = self.needs.statistics
        if statistics:
            entries = facts.upload(self.entries_of([req_id]))
            rows = StatsRows(entries, zero[:, None], zero + 1, zero, zero + 1, zero[:, None])
            for layer_idx in range(len(facts)):
                self.keep_stats(layer_idx, statistics, rows, queries)
