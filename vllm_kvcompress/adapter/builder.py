# SPDX-License-Identifier: Apache-2.0
"""Builds the attention metadata of a compressed layer group, on every platform.

A request's KV head is, for attention over head pages, a paged sequence of its own: G query heads,
one KV head, its own page table and length. So R requests run as a *per-head batch* of R * Hkv
sequences through the platform's own attention kernel. A request that has not been compressed may
take part: its head pages are those of its own blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvcompress import kernels
from vllm_kvcompress.adapter.backend import CompressedImpl
from vllm_kvcompress.adapter.compression_config import describe_budget
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.layers import CompressedLayers
from vllm_kvcompress.adapter.metadata import (
    CompressedMetadata,
    PerHeadBatch,
    QueryCopy,
    TokenIndex,
)
from vllm_kvcompress.batch import (
    ChunkStats,
    StepBatch,
    by_statistics,
    head_major_order,
    plan_stats,
    query_runs,
    ranges,
)
from vllm_kvcompress.config import NOTHING, KVCompressionError
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.page_state import PageTables
from vllm_kvcompress.prefill_stats import StatsRows

logger = init_logger("vllm.kvcompress")


class CompressedBuilder:
    """Mixin of a platform's metadata builder.

    The platform class supplies ``make_per_head_builder`` (a second builder of the platform, for one
    KV head), ``page_layout``, and ``static_buffer`` where steps are replayed from full graphs.
    """

    platform_backend: ClassVar[str]
    supports_update_block_table = False
    block_size: int
    device: torch.device
    layer_names: list[str]

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        if not isinstance(kv_cache_spec, CompressedSpec):
            raise KVCompressionError(
                "KV compression was asked for, but vLLM gives these layers a cache that cannot be "
                f"compressed ({type(kv_cache_spec).__name__}): serve the model without "
                "--kv-compression."
            )
        context = vllm_config.compilation_config.static_forward_context
        modules = {name: context[name] for name in layer_names}
        self.layers = self._shared(vllm_config, kv_cache_spec, modules)
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        # of a request whose drafts are verified; graphs are captured for as many
        self.decode_query_len = 1 + vllm_config.num_speculative_tokens
        # a full graph replays per-head batches only
        self.replays_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.max_num_blocks = -(-vllm_config.model_config.max_model_len // self.block_size)
        self.per_head_builder = self.make_per_head_builder(
            replace(kv_cache_spec.base_spec(), num_kv_heads=1), vllm_config
        )
        self.arange = torch.arange(self.max_num_seqs * self.num_kv_heads + 1, dtype=torch.int32)
        self._tables: PageTables | None = None
        self._announce(vllm_config)

    def _shared(self, vllm_config, spec: CompressedSpec, modules: dict) -> CompressedLayers:
        """What all builders of these layers share: vLLM makes several in turn."""
        impls = [module.impl for module in modules.values()]
        assert all(isinstance(impl, CompressedImpl) for impl in impls)
        if impls[0].layers is None:
            layout = self.page_layout(spec.head_size)
            layers = CompressedLayers(vllm_config, spec, modules, self.device, layout)
            for impl in impls:
                impl.layers = layers
        return impls[0].layers

    @property
    def tables(self) -> PageTables:
        if self._tables is None or self._tables.state is not self.layers.state:
            self._tables = PageTables(self.layers.state, self.max_num_blocks, self.block_size)
        return self._tables

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full graphs hold decode steps only: they are captured as per-head batches."""
        return AttentionCGSupport.UNIFORM_BATCH

    def make_per_head_builder(self, spec: FullAttentionSpec, vllm_config) -> Any:
        raise NotImplementedError

    def page_layout(self, head_size: int) -> PageLayout:
        raise NotImplementedError

    def static_buffer(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A tensor of a decode step as graphs will read it; without graphs the tensor itself.

        ``name`` is "slots" or "starts".
        """
        return value

    def _announce(self, vllm_config) -> None:
        config, layers = self.layers.config, self.layers
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        logger.info_once(
            "KV compression is on: scorer %s, allocator %s, merge %s, budget %s per KV head, "
            "window %d, when %s, requests may choose %s, workspace %d MiB, room "
            "for %d prompts that wait, block size %d, "
            "%d layers x %d KV heads, backend %s on %s, model runner %s, kernels: %s.",
            config.scorer,
            config.allocator,
            config.merge,
            describe_budget(config),
            config.window,
            config.when,
            ", ".join(config.allow) or NOTHING,
            config.workspace_mib,
            layers.num_entries,
            self.block_size,
            layers.num_layers,
            self.num_kv_heads,
            self.platform_backend,
            self.device,
            runner,
            kernels.describe(self.device.type),
        )

    def build_for_cudagraph_capture(self, cam: CommonAttentionMetadata):
        nobody = np.full(cam.num_reqs, self.layers.state.num_slots, dtype=np.int64)
        batch = self._decode_batch(cam, nobody, cam.max_seq_len, cam.max_query_len)
        return CompressedMetadata(cam.num_actual_tokens, per_head=batch)

    def build(self, common_prefix_len: int, cam: CommonAttentionMetadata, fast_build: bool = False):
        if not self.layers.in_step:  # dummy runs have no requests
            return super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        brings_rows = self.layers.step_brings_rows
        query_len = 0 if brings_rows else self._common_query_len(cam)
        replays = query_len > 0 and self.replays_graphs
        meta = CompressedMetadata(cam.num_actual_tokens)
        if not (brings_rows or replays or self.layers.is_compressed.any()):
            meta.prefill = super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
            return meta
        batch = self.layers.batch(cam)
        compressed = batch.compressed
        if replays or (query_len and compressed.all()):
            slots = np.full(cam.num_reqs, self.layers.state.num_slots, dtype=np.int64)
            slots[: len(batch.slots)] = batch.slots
            max_seq_len = int(self.layers.most_held(batch).max())
            meta.per_head = self._decode_batch(cam, slots, max_seq_len, query_len)
            return meta
        if not compressed.any():
            meta.prefill = super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        else:
            self._prefill_part(meta, cam, batch)
            meta.per_head = self._mixed_batch(cam, batch)
        if brings_rows:
            self._keep_part(meta, cam, batch)
        return meta

    def _common_query_len(self, cam: CommonAttentionMetadata) -> int:
        """Tokens of each request in a step that may be replayed from a graph; else 0."""
        longest = cam.max_query_len
        if longest == 1 or longest > self.decode_query_len:
            return int(longest == 1)
        lengths = np.diff(cam.query_start_loc_cpu.numpy())
        alike = (lengths == longest) | (lengths == 0)  # a graph's padding has no tokens
        return longest if alike.all() else 0

    def _prefill_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, batch: StepBatch
    ) -> None:
        """The platform's metadata of the requests that have not been compressed."""
        chosen = np.flatnonzero(~batch.compressed)
        if not chosen.size:
            return
        upload = self.layers.facts.upload
        lens = batch.query_lens[chosen]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        # before rejected drafts are taken back, which the device may know first
        seq_lens = (batch.num_computed[chosen] + lens).astype(np.int32)
        index = upload(chosen)
        meta.prefill_tokens = self._tokens(batch.query_starts[chosen], lens)
        sub = replace(
            cam,
            query_start_loc=upload(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=cam.seq_lens[index],
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            num_reqs=len(chosen),
            num_actual_tokens=int(lens.sum()),
            max_query_len=int(lens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=cam.block_table_tensor[index],
            is_prefilling=None,
            req_idx=None,
        )
        meta.prefill = super().build(0, sub)  # type: ignore[misc]

    def _keep_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, batch: StepBatch
    ) -> None:
        """What this step leaves behind for prompts that will be compressed."""
        layers, chunks = self.layers, batch.chunks()
        runs = query_runs(chunks)
        if runs:
            owners, tokens, lengths, distances = zip(*runs, strict=True)
            req_ids = [batch.req_ids[i] for i in owners]
            places = layers.waiting.places(req_ids, np.array(distances), np.array(lengths))
            meta.queries = self._query_copy(tokens, places.tolist(), lengths)
        meta.stats = [
            (needs, self._stats_rows(cam, batch, group))
            for needs, alike in by_statistics(chunks).items()
            for group in plan_stats(alike)
        ]

    def _query_copy(
        self, tokens: Sequence[int], places: Sequence[int], lengths: Sequence[int]
    ) -> QueryCopy:
        """Runs of queries, from their first tokens and places and their lengths."""
        if len(lengths) == 1:
            return QueryCopy(*(slice(first, first + lengths[0]) for (first,) in (tokens, places)))
        both = [ranges(np.array(first), np.array(lengths)) for first in (tokens, places)]
        return QueryCopy(*self.layers.facts.upload(np.stack(both)))

    def _stats_rows(
        self, cam: CommonAttentionMetadata, batch: StepBatch, chunks: ChunkStats
    ) -> StatsRows:
        layers = self.layers
        entries = layers.waiting.entries_of([batch.req_ids[i] for i in chunks.owner])
        width = int(chunks.lengths.max())
        index = np.arange(width) - width + chunks.lengths[:, None]  # [M, C], < 0: not a token
        tokens = np.where(index >= 0, chunks.starts[:, None] + index, 0)
        rows = (chunks.lengths, chunks.positions, chunks.counted, chunks.owner)
        entries, lengths, positions, counted, chosen = layers.facts.upload(
            np.stack([entries, *rows])
        )
        num_blocks = -(-int((chunks.positions + chunks.lengths).max()) // self.block_size)
        return StatsRows(
            entries=entries,
            tokens=layers.facts.upload(tokens),
            lengths=lengths,
            positions=positions,
            counted=counted,
            block_table=cam.block_table_tensor[chosen, :num_blocks].long(),
        )

    def _decode_batch(
        self, cam: CommonAttentionMetadata, slots: np.ndarray, max_seq_len: int, query_len: int
    ) -> PerHeadBatch:
        """All requests decode, or verify drafts, with equally many tokens.

        Padding rows of a full graph have no query token, like vLLM's own.
        """
        num_reqs, num_heads = cam.num_reqs, self.num_kv_heads
        num_queries = int(cam.query_start_loc_cpu[num_reqs]) * num_heads
        starts = self.arange[: num_reqs * num_heads + 1] * query_len
        num_tokens = cam.num_actual_tokens // query_len * query_len
        per_head_cam = self._per_head_cam(
            cam, starts.clamp(max=num_queries), num_reqs, num_tokens, query_len, max_seq_len
        )
        per_head_cam.query_start_loc = self.static_buffer("starts", per_head_cam.query_start_loc)
        slot_tensor = self.static_buffer("slots", self.layers.facts.upload(slots))
        rows = slot_tensor, cam.block_table_tensor[:num_reqs], cam.seq_lens[:num_reqs]
        tokens = slice(0, num_tokens)
        return PerHeadBatch(tokens, None, self._metadata_maker(per_head_cam, *rows), query_len)

    def _mixed_batch(self, cam: CommonAttentionMetadata, batch: StepBatch) -> PerHeadBatch:
        """The compressed requests of a step that has others, or brings several tokens of one."""
        upload = self.layers.facts.upload
        chosen = np.flatnonzero(batch.compressed)
        lens = batch.query_lens[chosen]
        starts = np.concatenate([[0], np.cumsum(np.repeat(lens, self.num_kv_heads))])
        index = upload(chosen)
        per_head_cam = self._per_head_cam(
            cam,
            torch.from_numpy(starts.astype(np.int32)),
            len(chosen),
            int(lens.sum()),
            int(lens.max()),
            int(self.layers.most_held(batch)[chosen].max()),
        )
        order = None
        if lens.max() > 1:
            first = np.cumsum(lens) - lens
            order = upload(head_major_order(first, lens, self.num_kv_heads))
        rows = upload(batch.slots[chosen]), cam.block_table_tensor[index], cam.seq_lens[index]
        return PerHeadBatch(
            self._tokens(batch.query_starts[chosen], lens),
            order,
            self._metadata_maker(per_head_cam, *rows),
        )

    def _tokens(self, starts: np.ndarray, lengths: np.ndarray) -> TokenIndex:
        """The tokens of some requests, in batch order."""
        first, end = int(starts[0]), int(starts[-1] + lengths[-1])
        if end - first == lengths.sum():
            return slice(first, end)
        return self.layers.facts.upload(ranges(starts, lengths))

    def _per_head_cam(
        self,
        cam: CommonAttentionMetadata,
        starts: torch.Tensor,
        num_reqs: int,
        num_tokens: int,
        max_query_len: int,
        max_seq_len: int,
    ) -> CommonAttentionMetadata:
        """Common metadata of the sequences, complete but for tables and lengths.

        Args:
            max_seq_len: bound on the physical length of any sequence.
        """
        return replace(
            cam,
            query_start_loc=self.layers.facts.upload(starts.numpy()),
            query_start_loc_cpu=starts,
            num_reqs=num_reqs * self.num_kv_heads,
            num_actual_tokens=num_tokens * self.num_kv_heads,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            seq_lens_cpu_upper_bound=None,
            is_prefilling=None,
            req_idx=None,
        )

    def _metadata_maker(
        self,
        cam: CommonAttentionMetadata,
        slots: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> Callable[[int], Any]:
        """The platform's metadata by layer; layers ask in their order.

        Layers that are all alike share one table, made here. Others get theirs where the first of
        as many as fit into memory asks, so that a graph sees them made. A layer that reads the
        cache of an earlier one may come back to tables that have been overwritten.
        """
        uniform = self.layers.uniform
        at_once = self.tables.layers_at_once(len(slots))
        prepared: list[Any] = []
        first_prepared = -1

        def fill(layer_idx: int) -> None:
            nonlocal first_prepared
            first_prepared = layer_idx
            num_layers = min(at_once, self.tables.num_layers - layer_idx)
            layer_pages = 0 if uniform else self.layers.facts.pages.layer_pages
            rows = slots, block_table, seq_lens
            tables = self.tables.fill(*rows, layer_idx, num_layers, layer_pages)
            prepared[:] = [
                self.per_head_builder.build(
                    0,
                    replace(cam, block_table_tensor=table, seq_lens=kv_len),
                    fast_build=not uniform,
                )
                for table, kv_len in zip(*tables, strict=True)
            ]

        def metadata_of(layer_idx: int) -> Any:
            if uniform:
                return prepared[0]
            index = layer_idx % at_once
            # at 0 also where tables were made before: a graph has to see it again
            if index == 0 or first_prepared != layer_idx - index:
                fill(layer_idx - index)
            return prepared[index]

        if uniform:
            fill(0)
        return metadata_of
