# SPDX-License-Identifier: Apache-2.0
"""Everything that a worker keeps for the compressed layers of its model."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.adapter.layer_facts import LayerFacts
from vllm_kvcompress.adapter.lora import RequestAdapters
from vllm_kvcompress.adapter.parallel import mean_over_heads, mean_over_replicas, rank_heads
from vllm_kvcompress.adapter.recorder import Recorder
from vllm_kvcompress.adapter.telemetry import WorkerTelemetry, labels_of
from vllm_kvcompress.adapter.waiting import WaitingPrompts
from vllm_kvcompress.allocation import Scope, StaticAllocator
from vllm_kvcompress.batch import StepBatch
from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.choices import Choices
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.kernels import PageLayout
from vllm_kvcompress.orders import ATTRIBUTE, CompressionOrder, StepOrders
from vllm_kvcompress.page_state import HeadPageState
from vllm_kvcompress.pipeline import (
    CompressionPipeline,
    FinishedPrefills,
    LayerStack,
    PromptBatch,
)
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.request_slots import RequestSlots
from vllm_kvcompress.scoring import Need


class CompressedLayers:
    """State, page pool, pipeline and counters of the compressed layers, and what they wait with.

    One object per worker, made with the first metadata builder and kept by the layers' attention
    implementations. Requests are known by slot while they live, and by entry while something of
    theirs is kept for their compression.

    Attributes:
        heads: [Hkv] int64, indices in the model of this rank's KV heads.
        step_brings_rows: whether the running step brings tokens that a method looks at. It must not
            be replayed from a full graph then, where our Python does not run.
        order_of: requests of a batch, without padding, from its common metadata; the worker's.
        adapters: of the requests; the worker's, None where there are none.
        recorder: remembers how one prompt is compressed; None unless somebody asks.

    Args:
        vllm_config: of the engine.
        spec: of the group of layers, with the block size that attention kernels see.
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
        self.facts = LayerFacts(vllm_config, modules, spec.num_kv_heads, device, layout)
        self.block_size, self.num_kv_heads = spec.block_size, spec.num_kv_heads
        self.num_entries = spec.num_entries
        # what waits is copied to be compressed: no more than reserved_bytes counts
        per_prompt = max(1, spec.entry_bytes * spec.num_layers)
        self._prompts_together = max(1, spec.config.copy_bytes // per_prompt)
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        max_blocks = -(-vllm_config.model_config.max_model_len // self.block_size)
        self._max_length = max_blocks * self.block_size
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        self.heads = rank_heads(spec.model_kv_heads, self.num_kv_heads, ranks)
        self._mean_over_replicas = mean_over_replicas(spec.model_kv_heads, ranks)
        labels = labels_of(vllm_config) if parallel.rank == 0 else None
        self.telemetry = WorkerTelemetry(device, labels)
        self.step_brings_rows = False
        self.order_of: Callable[[CommonAttentionMetadata], Sequence[str]] | None = None
        self.adapters: RequestAdapters | None = None
        self.recorder: Recorder | None = None
        self.configure(spec.planner)

    def configure(self, planner: BlockPlanner) -> None:
        """Compress by this planner's configuration, and by what requests may choose beside it.

        No request may be running.
        """
        self.planner, self.config = planner, planner.config
        self.choices = Choices.of(planner.config, planner.block_size)
        num_layers = self.num_layers
        assert planner.num_layers == num_layers, "plans count the layers of the group"
        self.uniform = all(map(_is_uniform, self.choices.configs))
        self.slots = RequestSlots(self.max_num_seqs)
        self.plans: dict[str, PromptPlan] = {}
        self.is_compressed = np.zeros(self.max_num_seqs + 1, dtype=bool)  # by slot
        self._tokens_freed = np.zeros(self.max_num_seqs + 1, dtype=np.int64)  # of every head
        self._num_computed: dict[str, int] | None = None
        self.state = HeadPageState(
            self.max_num_seqs,
            1 if self.uniform else num_layers,
            self.num_kv_heads,
            self.facts.device,
        )
        self._pipelines: dict[KVCompressionConfig, CompressionPipeline] = {}
        self.waiting = self._no_prompts()

    def _pipeline(self, operation: KVCompressionConfig) -> CompressionPipeline:
        """Of prompts with this ``KVCompressionConfig.operation``."""
        if operation not in self._pipelines:  # one for each method and window that was chosen
            self._pipelines[operation] = CompressionPipeline(
                operation.scoring,
                operation.allocation,
                operation.merging,
                operation.window,
                self.num_kv_heads,
                self.facts.layout,
                self.state,
                mean_over_heads=mean_over_heads,
                first_head=int(self.heads[0]),
                mean_over_replicas=self._mean_over_replicas,
                workspace_bytes=operation.workspace_mib << 20,
            )
        return self._pipelines[operation]

    def _no_prompts(self) -> WaitingPrompts:
        choices = self.choices
        return WaitingPrompts(
            self.facts, choices.needs, choices.max_rows, self.num_entries, self._max_length
        )

    @property
    def num_layers(self) -> int:
        return len(self.facts)

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
        self.slots.assign(output.num_scheduled_tokens)

    def end_step(self) -> None:
        self._num_computed = None

    def batch(self, cam: CommonAttentionMetadata) -> StepBatch:
        """The requests of the running step, in the order of its batch."""
        assert self._num_computed is not None, "a step is running"
        assert self.order_of is not None, "the worker has said how"
        req_ids = self.order_of(cam)
        slots = self.state_slots(req_ids)
        starts = cam.query_start_loc_cpu.numpy()[: len(req_ids) + 1].astype(np.int64)
        return StepBatch(
            req_ids=req_ids,
            slots=slots,
            compressed=slots < self.state.num_slots,
            plans=[self.plans.get(req_id) for req_id in req_ids],
            num_computed=np.array([self._num_computed[req_id] for req_id in req_ids], np.int64),
            query_lens=starts[1:] - starts[:-1],
            query_starts=starts[:-1],
        )

    def state_slots(self, req_ids: Sequence[str]) -> np.ndarray:
        """Slots of requests in the page state; nobody's for those that are not compressed."""
        slots = self.slots.of(req_ids)
        return np.where(self.is_compressed[slots], slots, self.state.num_slots)

    def most_held(self, batch: StepBatch) -> np.ndarray:
        """Bound [R] on the tokens that a head of each request attends to."""
        return batch.num_computed + batch.query_lens - self._tokens_freed[batch.slots]

    def _brings_rows(self, num_scheduled_tokens: dict[str, int]) -> bool:
        assert self._num_computed is not None, "a step is running"
        for req_id, plan in self.plans.items():
            start = self._num_computed.get(req_id)
            if start is not None and plan.looks_at(start, start + num_scheduled_tokens[req_id]):
                return True
        return False

    def forget(self, req_ids: Sequence[str]) -> None:
        """These requests have left, or come back as new ones."""
        req_ids = [req_id for req_id in req_ids if req_id in self.slots]
        if not req_ids:
            return
        for req_id in req_ids:
            self.plans.pop(req_id, None)
        self.is_compressed[self.slots.release(req_ids)] = False
        self.waiting.release(req_ids)

    # compression

    def compress(self, orders: Sequence[CompressionOrder]) -> None:
        """Compress these prompts in all layers; afterwards they attend to their head pages.

        Prompts that differ in budgets only go together.
        """
        groups: dict[KVCompressionConfig, list[CompressionOrder]] = {}
        for order in orders:
            if order.req_id in self.slots:
                groups.setdefault(order.plan.config.operation, []).append(order)
        for operation, alike in groups.items():
            together = self._prompts_together
            adapters = self._projecting_adapters(operation)
            if adapters is not None and adapters.count([o.req_id for o in alike]) > adapters.most:
                together = 1  # there is no room for all of their adapters at a time
            if self.recorder is not None:
                together = 1
            for start in range(0, len(alike), together):
                self._compress(operation, alike[start : start + together])

    def _compress(self, operation: KVCompressionConfig, orders: Sequence[CompressionOrder]) -> None:
        req_ids = [order.req_id for order in orders]
        slots = self.slots.of(req_ids)
        with self.telemetry.compression():
            prompts = self._prompts(operation, slots, orders)
            num_rows = max(order.plan.num_rows for order in orders)
            stack = self._stack(operation, req_ids, num_rows)
            pipeline = self._pipeline(operation)
            if self.recorder is not None and self.recorder.wants(req_ids[0]):
                count = self.recorder.compress(pipeline, prompts, stack, orders[0].plan)
            else:
                count = pipeline.compress(prompts, stack)
            self.telemetry.record(
                count,
                tokens_per_page=self.block_size / (self.num_layers * self.num_kv_heads),
                tail_tokens=[order.plan.tail for order in orders],
                prompt_tokens=[order.plan.facts.length for order in orders],
            )
        self.is_compressed[slots] = True
        freed = [plan.num_full_blocks - self._max_pages(plan) for _, plan, _ in orders]
        self._tokens_freed[slots] = self.block_size * np.array(freed)
        self.waiting.release(req_ids)
        for req_id in req_ids:
            del self.plans[req_id]

    def _projecting_adapters(self, operation: KVCompressionConfig) -> RequestAdapters | None:
        """The adapters, where a method projects rows of its own through them."""
        return self.adapters if Need.HIDDEN_MOMENTS in operation.needs else None

    def _stack(
        self, operation: KVCompressionConfig, req_ids: Sequence[str], num_rows: int
    ) -> LayerStack:
        adapters, slots = self._projecting_adapters(operation), None
        if adapters is not None:
            slots = self.facts.upload(adapters.slots(req_ids))
        return self.waiting.stack(req_ids, operation.needs, num_rows, slots)

    def _prompts(
        self,
        operation: KVCompressionConfig,
        slots: np.ndarray,
        orders: Sequence[CompressionOrder],
    ) -> FinishedPrefills:
        plans = [order.plan for order in orders]
        lengths = [plan.facts.length for plan in plans]
        fields = PromptBatch._fields[2:]
        numbers = [[getattr(plan, name) for plan in plans] for name in fields]
        upload = self.facts.upload
        width = max(len(order.block_ids) for order in orders)
        table = np.zeros((len(orders), width), dtype=np.int64)
        for row, order in zip(table, orders, strict=True):
            row[: len(order.block_ids)] = order.block_ids
        packed = upload(np.concatenate([np.array([slots, lengths, *numbers]).T, table], axis=1))
        columns, block_table = (
            part.contiguous() for part in packed.split([len(fields) + 2, width], dim=1)
        )
        only_visual = operation.candidates is not Candidates.ALL
        extra: dict[str, Any] = {}
        if Need.SEGMENTS in operation.needs or only_visual:
            segment = np.stack([plan.facts.segments(width * self.block_size) for plan in plans])
            extra["segment"] = upload(segment)
            extra["num_segments"] = int(segment.max(initial=-1)) + 1
            if Need.GRIDS in operation.needs:
                most = max(extra["num_segments"], 1)
                grids = np.stack([plan.facts.grids(most) for plan in plans])
                extra["grids"] = upload(grids)
            if only_visual:
                extra["visual"] = extra["segment"] >= 0
        if isinstance(operation.allocation, StaticAllocator):
            budgets = np.array([self.planner.head_budgets(plan) for plan in plans])
            extra["head_budgets"] = self.facts.upload(
                np.ascontiguousarray(budgets[:, :, self.heads])
            )
        return FinishedPrefills(
            batch=PromptBatch(*columns.t().contiguous()),
            block_table=block_table,
            max_pages=max(self._max_pages(plan) for plan in plans),
            pages_per_layer=max(plan.num_kept_blocks for plan in plans) * self.num_kv_heads,
            **extra,
        )

    def _max_pages(self, plan: PromptPlan) -> int:
        """Bound on the pages of one head."""
        config = plan.config
        if _is_uniform(config):
            return plan.num_kept_blocks
        owners = self.num_kv_heads * (self.num_layers if config.spans_layers else 1)
        return min(plan.num_kept_blocks * owners, plan.num_full_blocks)

    def warm_up(self, max_model_len: int) -> None:
        """Compress a made-up prompt by each method, so that no request waits for compilers.

        All its blocks are vLLM's null block, which nobody reads; no request has its slot yet.
        """
        length, window = max_model_len - 1, self.config.window
        visual = ((1, length - window - 1),) if length > window + 2 else ()
        for config in self.choices.configs:
            plan = self.planner.with_config(config).plan(PromptFacts(length, visual))
            if not plan.compresses:
                continue
            order = CompressionOrder("", plan, [0] * -(-length // self.block_size))
            self.waiting.fill_for_warm_up("")
            prompts = self._prompts(config.operation, np.array([0]), [order])
            stack = self._stack(config.operation, [""], plan.num_rows)
            self._pipeline(config.operation).compress(prompts, stack)
        self.waiting = self._no_prompts()  # attention may bring queries of another type


def _is_uniform(config: KVCompressionConfig) -> bool:
    return config.allocation.scope is Scope.UNIFORM
