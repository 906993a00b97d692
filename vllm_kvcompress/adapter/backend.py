# SPDX-License-Identifier: Apache-2.0
"""The part of a compressing attention backend that is the same on every platform.

A request's KV head is, for decoding, a paged sequence of its own: G query heads, one KV head, its own
page table and length. So decode rows of R requests run as a *virtual batch* of R * Hkv sequences
through the platform's own attention kernel, while prompts run as stock vLLM runs them.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils import torch_utils
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from vllm_kvcompress.adapter import refusals
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.runner import current_step
from vllm_kvcompress.adapter.settings import settings_of
from vllm_kvcompress.adapter.telemetry import WorkerTelemetry
from vllm_kvcompress.batch import StepRows, head_major_order, plan_windows, ranges
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.pipeline import CompressionPipeline, EndingPrompts, HeadPageState

logger = init_logger("vllm.kvcompress")


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


class WindowStore:
    """Queries of observation windows that straddle prefill chunks, by request.

    Grows with the number of requests that are inside their window at the same time (few), and gives
    the rows back when a request ends its prompt or leaves.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        self._num_layers = num_layers
        self._window = window
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self.queries: torch.Tensor | None = None  # [rows, L, W, Hq, D]

    def rows(self, req_ids: list[str]) -> np.ndarray:
        """Rows [len(req_ids)] int64 of the requests; new ones get a row."""
        for req_id in req_ids:
            if req_id not in self._row_of:
                taken = len(self._row_of) + len(self._free)
                self._row_of[req_id] = self._free.pop() if self._free else taken
        return np.array([self._row_of[req_id] for req_id in req_ids], dtype=np.int64)

    def discard(self, req_ids) -> None:
        for req_id in req_ids:
            row = self._row_of.pop(req_id, None)
            if row is not None:
                self._free.append(row)

    def reserve(self, like: torch.Tensor) -> torch.Tensor:
        """The storage, large enough for every row; ``like`` [..., Hq, D] gives type and device."""
        need = len(self._row_of) + len(self._free)
        if self.queries is None or self.queries.shape[0] < need:
            shape = (2 * need, self._num_layers, self._window, *like.shape[-2:])
            grown = like.new_zeros(shape)
            if self.queries is not None:
                grown[: self.queries.shape[0]] = self.queries
            self.queries = grown
        return self.queries


@dataclass
class WindowTransfer:
    """Index tensors that move window queries in this step (see ``batch.WindowPlan``)."""

    tokens: torch.Tensor | None  # [N, W]
    load: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # row of N, window row, store row
    save: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # store row, window row, token


@dataclass
class VirtualBatch:
    """Decode rows as R * Hkv sequences.

    Attributes:
        slots: [R] int64 device, state slots.
        seq_lens, block_table: of the rows, device.
        order: [T * Hkv] int64 device, query rows of the batch in virtual order; None when the batch is
            all decode rows of one token, whose memory already is in that order.
        cam: ready-made common metadata, complete but for tables and lengths.
        width: pages per table row.
        prepared: the platform's metadata when all layers share one table.
    """

    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    order: torch.Tensor | None
    cam: CommonAttentionMetadata
    width: int
    prepared: Any = None


@dataclass
class CompressedMetadata:
    """One step's attention metadata of a compressing group: natural part, virtual part, compression.

    Attributes:
        builder: made this; owns state and pipeline.
        natural: the platform's metadata of prompt rows; None when there are none.
        natural_tokens: [T] int64 device, their tokens; None when they are the whole batch.
        virtual: decode rows; None when there are none.
        ending: prompts to compress; None when there are none.
        windows: window queries to move; None when there are none.
    """

    builder: "CompressedBuilder"
    num_actual_tokens: int
    natural: Any = None
    natural_tokens: torch.Tensor | None = None
    virtual: VirtualBatch | None = None
    ending: EndingPrompts | None = None
    tail_tokens: int = 0
    windows: WindowTransfer | None = None


class CompressedBuilder:
    """Mixin of a platform's metadata builder.

    The platform class supplies ``make_virtual_builder`` (a second builder of the platform, for one KV
    head), ``page_layout`` and may refine ``virtual_tables``.
    """

    supports_update_block_table = False
    block_size: int
    device: torch.device
    layer_names: list[str]

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        settings = settings_of(vllm_config)
        if not isinstance(kv_cache_spec, CompressedSpec) or settings is None:
            raise KVCompressionError(
                "KV compression was asked for, but vLLM gives these layers a cache that cannot be "
                f"compressed ({type(kv_cache_spec).__name__}): serve the model without "
                "--kv-compression."
            )
        self.settings: KVCompressionConfig = settings
        names = sorted(layer_names, key=extract_layer_index)
        self.layer_rows = {name: row for row, name in enumerate(names)}
        self.layer_indices = {name: extract_layer_index(name) for name in names}
        self.last_layer = names[-1]
        self.num_kv_heads = kv_cache_spec.num_kv_heads
        self.max_num_rows = vllm_config.scheduler_config.max_num_seqs
        allocator = settings.make_allocator()
        self.even = allocator.even
        self.state = HeadPageState(
            self.max_num_rows, 1 if self.even else len(names), self.num_kv_heads, device
        )
        self.pipeline = CompressionPipeline(
            settings.make_scorer(), allocator, settings.window, self.page_layout(), self.state
        )
        self.window_store = WindowStore(len(names), settings.window)
        rank = vllm_config.parallel_config.rank
        self.telemetry = WorkerTelemetry(device, active=rank == 0)
        self.virtual_builder = self.make_virtual_builder(
            replace(kv_cache_spec.plain(), num_kv_heads=1), vllm_config
        )
        self.arange = torch.arange(self.max_num_rows * self.num_kv_heads + 1, dtype=torch.int32)
        self._announce(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        """Full graphs hold decode steps only: they are captured as virtual batches."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def make_virtual_builder(self, spec: FullAttentionSpec, vllm_config) -> Any:
        raise NotImplementedError

    def page_layout(self) -> PageLayout:
        raise NotImplementedError

    def _announce(self, vllm_config) -> None:
        runner = "V2" if vllm_config.use_v2_model_runner else "V1"
        logger.info_once(
            "KV compression is on: scorer %s, allocator %s, budget %s tokens per KV head, window %d, "
            "block size %d, %d layers x %d KV heads, backend %s on %s, model runner %s. Refused: %s.",
            self.settings.scorer,
            self.settings.allocator,
            self.settings.budget,
            self.settings.window,
            self.block_size,
            len(self.layer_rows),
            self.num_kv_heads,
            type(self).__mro__[2].__name__.removesuffix("MetadataBuilder"),
            self.device,
            runner,
            refusals.SUMMARY,
        )

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """Start copying a host array to the device."""
        if self.device.type == "cpu":
            return torch.from_numpy(values)
        return torch_utils.async_tensor_h2d(values, device=self.device)

    def build_for_cudagraph_capture(self, cam: CommonAttentionMetadata):
        nobody = np.full(cam.num_reqs, self.state.num_slots, dtype=np.int64)
        return CompressedMetadata(
            self, cam.num_actual_tokens, virtual=self._decode_batch(cam, nobody)
        )

    def build(self, common_prefix_len: int, cam: CommonAttentionMetadata, fast_build: bool = False):
        step = current_step()
        if step is None:  # dummy runs have no requests
            return super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        self.telemetry.poll()
        self.window_store.discard(step.state.slots.take_left())
        rows = step.rows(cam)
        self._begin_requests(rows)
        decode, prompt = rows.decode_part, rows.prompt_part
        if not prompt.any() and cam.max_query_len == 1:
            slots = np.full(cam.num_reqs, self.state.num_slots, dtype=np.int64)
            slots[: len(rows.slots)] = rows.slots
            return CompressedMetadata(
                self, cam.num_actual_tokens, virtual=self._decode_batch(cam, slots)
            )
        meta = CompressedMetadata(self, cam.num_actual_tokens)
        if not decode.any():
            meta.natural = super().build(common_prefix_len, cam, fast_build)  # type: ignore[misc]
        elif prompt.any():
            self._natural_part(meta, cam, rows)
        self._compression_part(meta, cam, rows)
        if decode.any():
            meta.virtual = self._mixed_batch(cam, rows)
        return meta

    def _begin_requests(self, rows: StepRows) -> None:
        """Give the state of new requests, and of prompts that end now, its starting value."""
        ends, compresses = rows.ends_prompt, rows.compresses
        lost = compresses & rows.fresh & (rows.num_computed >= rows.prompt_lens)
        assert not lost.any(), "a request came past its prompt without having been compressed"
        begin = np.flatnonzero(rows.fresh | ends)
        if begin.size == 0:
            return
        done = (compresses & ends)[begin]
        num_full = [plan.num_full_blocks for plan in (rows.plans[i] for i in begin)]
        num_kept = [plan.num_kept_blocks for plan in (rows.plans[i] for i in begin)]
        packed = self.upload(
            np.stack([rows.slots[begin], np.where(done, num_full, 0), np.where(done, num_kept, 1)])
        )
        self.state.begin(packed[0], packed[1], packed[2])

    def _natural_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, rows: StepRows
    ) -> None:
        """The platform's metadata for the prompt tokens of a mixed batch."""
        part = rows.prompt_part
        chosen = np.flatnonzero(part)
        lens = part[chosen]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        seq_lens = (rows.num_computed[chosen] + lens).astype(np.int32)
        index = self.upload(chosen)
        meta.natural_tokens = self.upload(ranges(rows.query_starts[chosen], lens))
        host_lens = torch.from_numpy(seq_lens)
        sub = replace(
            cam,
            query_start_loc=self.upload(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self.upload(seq_lens),
            seq_lens_cpu_upper_bound=host_lens,
            num_reqs=len(chosen),
            num_actual_tokens=int(lens.sum()),
            max_query_len=int(lens.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=cam.block_table_tensor[index],
            is_prefilling=None,
            req_idx=None,
        )
        meta.natural = super().build(0, sub)  # type: ignore[misc]

    def _compression_part(
        self, meta: CompressedMetadata, cam: CommonAttentionMetadata, rows: StepRows
    ) -> None:
        """What ends in this step, and the window queries that it brings or still misses."""
        ends = rows.ends_prompt
        ending = np.flatnonzero(ends & rows.compresses)
        self.telemetry.record_prompts(
            len(ending), int(ends.sum()) - len(ending), int(rows.prompt_lens[ending].sum())
        )
        windows = plan_windows(rows, ending, self.settings.window)
        load = save = tokens = None
        if windows.load[0].size:
            entry, window_row, owner = windows.load
            store = self.window_store.rows([rows.req_ids[i] for i in owner])
            load = tuple(self.upload(a) for a in (entry, window_row, store))
        if windows.save[0].size:
            owner, window_row, token = windows.save
            store = self.window_store.rows([rows.req_ids[i] for i in owner])
            save = tuple(self.upload(a) for a in (store, window_row, token))
        if ending.size:
            tokens = self.upload(windows.tokens)
            meta.ending = self._ending_prompts(cam, rows, ending)
            meta.tail_tokens = sum(rows.plans[i].tail for i in ending)
            self.window_store.discard(rows.req_ids[i] for i in ending)
        if ending.size or save:
            meta.windows = WindowTransfer(tokens, load, save)

    def _ending_prompts(
        self, cam: CommonAttentionMetadata, rows: StepRows, ending: np.ndarray
    ) -> EndingPrompts:
        plans = [rows.plans[i] for i in ending]
        facts = np.array(
            [
                rows.slots[ending],
                rows.prompt_lens[ending],
                [plan.budget - self.settings.window for plan in plans],
                [plan.num_full_blocks for plan in plans],
                [plan.num_kept_blocks for plan in plans],
                [plan.tail for plan in plans],
                ending,
            ],
            dtype=np.int64,
        )
        slots, prompt_lens, capacity, num_full, num_kept, tail, index = self.upload(facts)
        num_blocks = -(-int(rows.prompt_lens[ending].max()) // self.block_size)
        pages = (plan.num_kept_blocks * (1 if self.even else self.num_kv_heads) for plan in plans)
        return EndingPrompts(
            slots=slots,
            prompt_lens=prompt_lens,
            capacity=capacity,
            num_full_blocks=num_full,
            num_kept_blocks=num_kept,
            tail=tail,
            block_table=cam.block_table_tensor[index, :num_blocks].long(),
            max_pages=max(
                min(p, plan.num_full_blocks) for p, plan in zip(pages, plans, strict=True)
            ),
        )

    def _decode_batch(self, cam: CommonAttentionMetadata, slots: np.ndarray) -> VirtualBatch:
        """All rows decode one token: query memory already is in virtual order.

        Padding rows of a full graph have no query token, like vLLM's own.
        """
        num_rows, num_heads = cam.num_reqs, self.num_kv_heads
        num_queries = int(cam.query_start_loc_cpu[num_rows]) * num_heads
        starts = self.arange[: num_rows * num_heads + 1].clamp(max=num_queries)
        virtual = VirtualBatch(
            slots=self.upload(slots),
            seq_lens=cam.seq_lens[:num_rows],
            block_table=cam.block_table_tensor[:num_rows],
            order=None,
            cam=self._virtual_cam(cam, starts, num_rows, cam.num_actual_tokens, 1),
            width=self._table_width(cam),
        )
        return self._share_table(virtual)

    def _mixed_batch(self, cam: CommonAttentionMetadata, rows: StepRows) -> VirtualBatch:
        """Decode parts of a step that also has prompt parts, or has more than one token in a row."""
        part = rows.decode_part
        chosen = np.flatnonzero(part)
        lens = part[chosen]
        first = rows.query_starts[chosen] + rows.query_lens[chosen] - lens
        starts = np.concatenate([[0], np.cumsum(np.repeat(lens, self.num_kv_heads))])
        index = self.upload(chosen)
        virtual = VirtualBatch(
            slots=self.upload(rows.slots[chosen]),
            seq_lens=cam.seq_lens[index],
            block_table=cam.block_table_tensor[index],
            order=self.upload(head_major_order(first, lens, self.num_kv_heads)),
            cam=self._virtual_cam(
                cam,
                torch.from_numpy(starts.astype(np.int32)),
                len(chosen),
                int(lens.sum()),
                int(lens.max()),
            ),
            width=self._table_width(cam),
        )
        return self._share_table(virtual)

    def _table_width(self, cam: CommonAttentionMetadata) -> int:
        return min(cam.block_table_tensor.shape[1], -(-cam.max_seq_len // self.block_size))

    def _virtual_cam(
        self,
        cam: CommonAttentionMetadata,
        starts: torch.Tensor,
        num_rows: int,
        num_tokens: int,
        max_query_len: int,
    ) -> CommonAttentionMetadata:
        return replace(
            cam,
            query_start_loc=self.upload(starts.numpy()),
            query_start_loc_cpu=starts,
            num_reqs=num_rows * self.num_kv_heads,
            num_actual_tokens=num_tokens * self.num_kv_heads,
            max_query_len=max_query_len,
            seq_lens_cpu_upper_bound=None,
            is_prefilling=None,
            req_idx=None,
        )

    def _share_table(self, virtual: VirtualBatch) -> VirtualBatch:
        """Layers that are all alike share one table, built here instead of in every layer."""
        if self.even:
            virtual.prepared = self.virtual_metadata(virtual, 0)
        return virtual

    def virtual_metadata(self, virtual: VirtualBatch, layer_row: int) -> Any:
        """The platform's metadata of one layer's virtual batch."""
        if virtual.prepared is not None:
            return virtual.prepared
        table, kv_len = self.state.tables(
            layer_row,
            virtual.slots,
            virtual.block_table,
            virtual.seq_lens,
            self.block_size,
            virtual.width,
        )
        cam = replace(virtual.cam, block_table_tensor=table, seq_lens=kv_len)
        return self.virtual_builder.build(0, cam, fast_build=not self.even)


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
