# SPDX-License-Identifier: Apache-2.0
"""Everything that a worker keeps for the compressed layers of its model."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils import torch_utils
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.adapter import attention_inputs, refusals
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.parallel import mean_over_heads, mean_over_replicas, rank_heads
from vllm_kvcompress.adapter.telemetry import WorkerTelemetry
from vllm_kvcompress.allocation import Scope, StaticAllocator
from vllm_kvcompress.batch import StepBatch
from vllm_kvcompress.config import Candidates, KVCompressionError
from vllm_kvcompress.kernels import PageLayout, PromptPages, as_bytes
from vllm_kvcompress.orders import ATTRIBUTE, CompressionOrder, StepOrders
from vllm_kvcompress.page_state import HeadPageState
from vllm_kvcompress.pipeline import (
    CompressionPipeline,
    FinishedPrefills,
    LayerStack,
    PromptBatch,
)
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.prefill_stats import PrefillStats, StatsRows
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.request_slots import RequestSlots
from vllm_kvcompress.scoring import Need


class AllPages(NamedTuple):
    """The head pages of all compressed layers as one tensor.

    Attributes:
        pages: [num_pages, block_size * 2 * D].
        layer_pages: pages from one layer to the next.
    """

    pages: torch.Tensor
    layer_pages: int


class CompressedLayers:
    """State, page pool, pipeline and counters of the compressed layers, and what they wait with.

    One object per worker, made with the first metadata builder and kept by the layers' attention
    implementations. Requests are known by slot while they live, and by entry while something of
    theirs is kept for their compression.

    Attributes:
        step_brings_rows: whether the running step brings tokens that a method looks at. It must not
            be replayed from a full graph then, where our Python does not run.
        order_of: requests of a batch, without padding, from its common metadata; the worker's.

    Args:
        vllm_config: of the engine.
        spec: of the group of layers.
        modules: the attention layers by name.
        device: of the worker.
        layout: where a head page keeps its elements.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        spec: CompressedSpec,
        modules: dict[str, Attention],
        device: torch.device,
        layout: PageLayout,
    ) -> None:
        names = sorted(modules, key=extract_layer_index)
        self.modules = [modules[name] for name in names]
        refusals.check_layers(self.modules)
        self.layer_indices = tuple(extract_layer_index(name) for name in names)
        self.position_of = {name: index for index, name in enumerate(names)}
        self.device, self.layout = device, layout
        self.block_size, self.num_kv_heads = spec.block_size, spec.num_kv_heads
        self.num_entries = spec.num_entries
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
        self.dtype = dtype
        max_blocks = -(-vllm_config.model_config.max_model_len // self.block_size)
        self._max_length = max_blocks * self.block_size
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        self.heads = rank_heads(spec.model_kv_heads, self.num_kv_heads, ranks)
        self._mean_over_replicas = mean_over_replicas(spec.model_kv_heads, ranks)
        self.telemetry = WorkerTelemetry(device, active=parallel.rank == 0)
        self.softcap = refusals.soft_cap(self.modules[0])
        self._scale = torch.tensor(
            [module.impl.scale for module in self.modules], dtype=torch.float32, device=device
        )
        self.step_brings_rows = False
        self.order_of: Callable[[CommonAttentionMetadata], Sequence[str]] | None = None
        self._pages: AllPages | None = None
        self._query_store: torch.Tensor | None = None
        self.configure(spec.planner)

    def configure(self, planner: BlockPlanner) -> None:
        """Compress by this planner's configuration from now on; no request may be running."""
        self.planner, self.config = planner, planner.config
        num_layers = len(self.modules)
        assert planner.num_layers == num_layers, "plans count the layers of the group"
        allocator = self.config.allocation
        self.even = allocator.scope is Scope.EVEN
        self.slots = RequestSlots(self.max_num_seqs)
        self.entries = RequestSlots(self.num_entries)
        self.plans: dict[str, PromptPlan] = {}
        self.is_compressed = np.zeros(self.max_num_seqs + 1, dtype=bool)  # by slot
        self._num_computed: dict[str, int] | None = None
        self.state = HeadPageState(
            self.max_num_seqs, 1 if self.even else num_layers, self.num_kv_heads, self.device
        )
        self.pipeline = CompressionPipeline(
            self.config.scoring,
            allocator,
            self.config.merging,
            self.config.window,
            self.num_kv_heads,
            self.layout,
            self.state,
            mean_over_heads=mean_over_heads,
            first_head=int(self.heads[0]),
            mean_over_replicas=self._mean_over_replicas,
            workspace_bytes=self.config.workspace_mib << 20,
        )
        self.stats = PrefillStats(num_layers, self.num_entries, self._max_length, self.config.needs)
        self._query_store = None

    @property
    def num_layers(self) -> int:
        return len(self.modules)

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """Start copying a host array to the device."""
        if self.device.type == "cpu":
            return torch.from_numpy(values)
        return torch_utils.async_tensor_h2d(values, device=self.device)

    # steps

    @property
    def in_step(self) -> bool:
        """A step with requests is running; False in dummy runs and while graphs are captured."""
        return self._num_computed is not None

    def begin_step(self, output: SchedulerOutput) -> None:
        """Follow the scheduler, and compress whom it has chosen."""
        orders = vars(output).get(ATTRIBUTE) or StepOrders()  # vLLM's own warm-up has none
        self.telemetry.poll()
        new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
        gone = output.finished_req_ids | (output.preempted_req_ids or set())
        # who comes back after a preemption is a new request
        self.forget([*gone, *(request.req_id for request in new), *cached.resumed_req_ids])
        self.plans.update(orders.plans)
        if orders.compress:
            self.compress(orders.compress)
        self._num_computed = {request.req_id: request.num_computed_tokens for request in new}
        self._num_computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.step_brings_rows = self._brings_rows(output.num_scheduled_tokens)
        fresh = self.slots.assign(output.num_scheduled_tokens)
        if fresh.size:
            self.is_compressed[fresh] = False
            self.state.reset(self.upload(fresh))

    def end_step(self) -> None:
        self._num_computed = None

    def batch(self, cam: CommonAttentionMetadata) -> StepBatch:
        """The requests of the running step, in the order of its batch."""
        assert self._num_computed is not None, "a step is running"
        assert self.order_of is not None, "the worker has said how"
        req_ids = self.order_of(cam)
        slots = self.slots.of(req_ids)
        starts = cam.query_start_loc_cpu.numpy()[: len(req_ids) + 1].astype(np.int64)
        return StepBatch(
            req_ids=req_ids,
            slots=slots,
            compressed=self.is_compressed[slots],
            plans=[self.plans.get(req_id) for req_id in req_ids],
            num_computed=np.array([self._num_computed[req_id] for req_id in req_ids], np.int64),
            query_lens=starts[1:] - starts[:-1],
            query_starts=starts[:-1],
        )

    def _brings_rows(self, num_scheduled_tokens: dict[str, int]) -> bool:
        assert self._num_computed is not None, "a step is running"
        for req_id, plan in self.plans.items():
            start = self._num_computed.get(req_id)
            if start is None or start >= plan.facts.length:
                continue
            if start + num_scheduled_tokens[req_id] > plan.first_row:
                return True
        return False

    def forget(self, req_ids: Sequence[str]) -> None:
        """These requests have left, or come back as new ones."""
        for req_id in req_ids:
            self.plans.pop(req_id, None)
        self.slots.release(req_ids)
        self.entries.release(req_ids)

    # what waits for compression

    def entries_of(self, req_ids: Sequence[str]) -> np.ndarray:
        """Entries [len(req_ids)] int64 of requests; those that have none get one."""
        fresh = self.entries.assign(dict.fromkeys(req_ids))
        if fresh.size:
            self.stats.clear(self.upload(fresh))
        return self.entries.of(req_ids)

    def query_places(self, req_ids: Sequence[str], distance: np.ndarray) -> np.ndarray:
        """Places in a layer's store of queries, by their distance from the prompt's last token."""
        return self.entries_of(req_ids) * self.planner.max_rows + distance

    def query_store(self, queries: torch.Tensor) -> torch.Tensor:
        """[L, places, Hq, D] for queries like these."""
        shape = (self.num_layers, self.num_entries * self.planner.max_rows, *queries.shape[1:])
        if self._query_store is None:
            self._query_store = torch.zeros(shape, dtype=queries.dtype, device=queries.device)
        return self._query_store

    def keep_stats(self, layer_idx: int, rows: StatsRows, queries: torch.Tensor) -> None:
        """Take a layer's tokens of this step into the statistics over their prompts.

        Args:
            queries: [tokens, Hq, D] of the batch, after norm and RoPE, as numbers.
        """
        module, stats = self.modules[layer_idx], self.stats
        if Need.KEY_ATTENTION_SUMS in stats.needs:
            cache = module.kv_cache
            pages = cache.view(-1, cache.shape[2] * cache.shape[3])
            num = len(rows.entries)
            scale, key_scale = self._scale[layer_idx].expand(num), None
            if (float8 := FLOAT8_TYPES.get(module.impl.kv_cache_dtype)) is not None:
                pages = pages.view(float8)
                key_scale = self._scales["key"][layer_idx].expand(num)
            prompts = PromptPages(
                pages, rows.block_table, self.num_kv_heads, self.layout, key_scale
            )
            stats.add_keys(rows, layer_idx, queries, prompts, scale, self.softcap)
        if stats.needs & attention_inputs.CAPTURED:
            inputs = attention_inputs.inputs_of(module)
            if Need.HIDDEN_MOMENTS in stats.needs:
                stats.add_hidden(rows, layer_idx, inputs.hidden)
            if Need.QUERY_MOMENTS in stats.needs:
                size = module.impl.head_size
                stats.add_queries(rows, layer_idx, inputs.queries.unflatten(1, (-1, size)))
            if layer_idx == 0:  # the same in all layers
                stats.set_positions(rows, inputs.positions)

    # compression

    @property
    def pages(self) -> AllPages:
        """The head pages of all layers.

        Raises:
            KVCompressionError: vLLM does not place the layers at equal distances.
        """
        caches = [module.kv_cache for module in self.modules]
        first = caches[0]
        if self._pages is None or self._pages.pages.data_ptr() != first.data_ptr():
            elems = first.shape[2] * first.shape[3]
            offsets = [cache.storage_offset() - first.storage_offset() for cache in caches]
            step = offsets[1] if len(offsets) > 1 else 0
            storages = {cache.untyped_storage().data_ptr() for cache in caches}
            regular = offsets == [index * step for index in range(len(offsets))]
            if len(storages) > 1 or not regular or step % (elems * self.num_kv_heads):
                raise KVCompressionError(
                    "KV compression reads all layers in one pass, but vLLM does not place the "
                    "layers of this model at equal distances: serve it without --kv-compression."
                )
            count = (offsets[-1] + first.numel()) // elems
            pages = torch.as_strided(first, (count, elems), (elems, 1), first.storage_offset())
            self._pages = AllPages(pages, step // elems)
        return self._pages

    def compress(self, orders: Sequence[CompressionOrder]) -> None:
        """Compress these prompts in all layers; afterwards they attend to their head pages."""
        orders = [order for order in orders if order.req_id in self.slots]
        if not orders:
            return
        req_ids = [order.req_id for order in orders]
        slots = self.slots.of(req_ids)
        with self.telemetry.compression():
            prompts = self._prompts(slots, orders)
            count = self.pipeline.compress(prompts, self._stack(req_ids, orders))
            self.telemetry.record(
                count,
                tokens_per_page=self.block_size / (self.num_layers * self.num_kv_heads),
                tail_tokens=sum(order.plan.tail for order in orders),
                prompt_tokens=sum(order.plan.facts.length for order in orders),
            )
        self.is_compressed[slots] = True
        self.entries.release(req_ids)
        for req_id in req_ids:
            del self.plans[req_id]

    def _prompts(self, slots: np.ndarray, orders: Sequence[CompressionOrder]) -> FinishedPrefills:
        plans = [order.plan for order in orders]
        lengths = [plan.facts.length for plan in plans]
        fields = PromptBatch._fields[2:]
        facts = [[getattr(plan, name) for plan in plans] for name in fields]
        width = max(len(order.block_ids) for order in orders)
        table = np.zeros((len(orders), width), dtype=np.int64)
        for row, order in zip(table, orders, strict=True):
            row[: len(order.block_ids)] = order.block_ids
        packed = self.upload(np.concatenate([np.array([slots, lengths, *facts]).T, table], axis=1))
        only_visual = self.config.candidates is not Candidates.ALL
        extra: dict[str, Any] = {}
        if Need.SEGMENTS in self.config.needs or only_visual:
            segment = np.stack([plan.facts.segments(width * self.block_size) for plan in plans])
            extra["segment"] = self.upload(segment)
            extra["num_segments"] = int(segment.max(initial=-1)) + 1
            if only_visual:
                extra["visual"] = extra["segment"] >= 0
        if isinstance(self.pipeline.allocator, StaticAllocator):
            budgets = np.array([self.planner.head_budgets(plan) for plan in plans])
            extra["head_budgets"] = self.upload(np.ascontiguousarray(budgets[:, :, self.heads]))
        return FinishedPrefills(
            batch=PromptBatch(*packed[:, : len(fields) + 2].t().contiguous()),
            block_table=packed[:, len(fields) + 2 :].contiguous(),
            max_pages=max(self._max_pages(plan) for plan in plans),
            pages_per_layer=max(plan.num_kept_blocks for plan in plans) * self.num_kv_heads,
            **extra,
        )

    def _max_pages(self, plan: PromptPlan) -> int:
        """Bound on the pages of one head."""
        if self.even:
            return plan.num_kept_blocks
        owners = self.num_kv_heads * (self.num_layers if self.config.spans_layers else 1)
        return min(plan.num_kept_blocks * owners, plan.num_full_blocks)

    def _stack(self, req_ids: Sequence[str], orders: Sequence[CompressionOrder]) -> LayerStack:
        pages, layer_pages = self.pages
        extra: dict[str, Any] = {}
        num_rows = max(order.plan.num_rows for order in orders)
        heads, head_size = self.modules[0].impl.num_heads, self.layout.head_size
        queries = pages.new_empty((self.num_layers, len(orders), 0, heads, head_size))
        if num_rows or self.stats:
            entries = self.upload(self.entries_of(req_ids))
        if num_rows:
            queries = self._kept_queries(entries, num_rows)
        if self.stats:
            extra = self._kept_stats(entries)
        float8 = FLOAT8_TYPES.get(self.modules[0].impl.kv_cache_dtype)
        if float8 is not None:
            pages = pages.view(float8)
            extra["key_scale"] = self._scales["key"]
            extra["value_scale"] = self._scales["value"]
        return LayerStack(
            layers=self.layer_indices,
            queries=queries,
            pages=pages,
            layer_pages=layer_pages,
            scale=self._scale,
            softcap=self.softcap,
            **extra,
        )

    def _kept_queries(self, entries: torch.Tensor, num_rows: int) -> torch.Tensor:
        """[L, N, Q, Hq, D] of the last Q positions, in the order of positions."""
        store = self._query_store
        assert store is not None, "queries were kept while the prompts were computed"
        store = store.unflatten(1, (self.num_entries, self.planner.max_rows))
        kept = as_bytes(store)[:, entries, :num_rows].flip(2).view(store.dtype)
        if kept.dtype.itemsize > 1:
            return kept
        # the attention kernel takes float8 queries
        scale = self._scales["query"].to(self.dtype)
        return kept.to(self.dtype) * scale[:, None, None, None, None]

    def _kept_stats(self, entries: torch.Tensor) -> dict[str, Any]:
        found = self.stats.totals(entries)
        if self.config.needs & attention_inputs.CAPTURED:
            found["projector"] = attention_inputs.StackProjector(
                [attention_inputs.inputs_of(module) for module in self.modules],
                self.stats.last_positions(entries),
                self.modules[0].impl.num_heads,
                self.layout.head_size,
            )
        return found

    @cached_property
    def _scales(self) -> dict[str, torch.Tensor]:
        """[L] float32 scales of a float8 cache; vLLM has them on the host, too."""
        names = {"query": "_q_scale_float", "key": "_k_scale_float", "value": "_v_scale_float"}
        return {
            kind: self.upload(np.array([getattr(m, name) for m in self.modules], np.float32))
            for kind, name in names.items()
        }

    def warm_up(self, max_model_len: int) -> None:
        """Compress a made-up prompt, so that no request waits for kernels to be compiled.

        All its blocks are vLLM's null block, which nobody reads, and its slot is nobody's.
        """
        length = max_model_len - 1
        visual = ((1, length - self.config.window - 1),) if length > self.config.window + 2 else ()
        plan = self.planner.plan(PromptFacts(length, visual))
        if not plan.compresses:
            return
        prompts = self._prompts(
            np.array([self.state.num_slots]),
            [CompressionOrder("", plan, [0] * -(-length // self.block_size))],
        )
        heads, size = self.modules[0].impl.num_heads, self.layout.head_size
        if plan.num_rows:
            self.query_store(torch.zeros(1, heads, size, dtype=self.dtype, device=self.device))
        stack = self._stack([""], [CompressionOrder("", plan, [])])
        self.pipeline.compress(prompts, stack)
        self.entries.release([""])
        self.state.reset(self.upload(np.array([self.state.num_slots])))
