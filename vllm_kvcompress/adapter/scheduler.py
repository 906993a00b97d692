# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, which decide here who is compressed when.

A decision frees blocks at once and travels with the scheduler output of the same step. Workers
carry it out before that step's forward pass, so whoever gets the blocks writes after the compaction
has read them, and the steps in flight, which still read them, are ahead of it on the device.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_kvcompress.adapter.kv_cache import CompressedKVCacheManager, TrackedRequest
from vllm_kvcompress.adapter.telemetry import SchedulerTelemetry, labels_of
from vllm_kvcompress.config import CONFIG_KEY
from vllm_kvcompress.orders import ATTRIBUTE, CompressionOrder, StepOrders
from vllm_kvcompress.policy import Outcome, WaitingQueue


class CompressionPolicy:
    """Decides for one scheduler; owns what outlives a request's blocks.

    Attributes:
        orders: decided in this step, by request.
        boundaries: position at which a request was compressed. A preempted request that comes back
            is compressed there again, so that its replayed outputs see what they saw before.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.manager = CompressedKVCacheManager.adopt(scheduler.kv_cache_manager, self.relieve)
        compressed = self.manager.compressed
        labels = labels_of(scheduler.vllm_config)
        compressed.telemetry = SchedulerTelemetry(labels, compressed.choices)
        self.orders: dict[str, CompressionOrder] = {}
        self.boundaries: dict[str, int] = {}
        self._unsettled: set[str] = set()  # boundaries that count drafts of the step in flight
        self._took_entry: list[TrackedRequest] = []  # in this step
        self._prefilling: dict[str, TrackedRequest] = {}  # their prompts are being computed
        self._waiting = WaitingQueue[TrackedRequest]()

    # decisions

    def begin_step(self) -> None:
        """Compress whom the policy wants compressed before anything is scheduled."""
        compressed = self.manager.compressed
        self.orders = {}
        for req_id, tracked in list(self._prefilling.items()):
            if compressed.tracked.get(req_id) is not tracked:  # preempted, finished or aborted
                del self._prefilling[req_id]
            elif tracked.is_prefilled:
                del self._prefilling[req_id]
                if tracked.plan.compresses:
                    self._waiting.add(req_id, tracked, tracked.when, req_id in self.boundaries)
                else:
                    compressed.count_whole(tracked)
        for req_id, tracked in self._waiting.expected():
            if compressed.tracked.get(req_id) is not tracked:
                self._waiting.discard(req_id)
            elif self._is_due(tracked):
                self._compress(tracked, Outcome.AT_ONCE)
        while (usage := self.manager.usage) > self._waiting.lowest_mark:
            if not self._compress_largest(Outcome.PRESSURE, usage=usage):
                break

    @property
    def may_clip(self) -> bool:
        """Whether :meth:`clip` may shorten some request's part of the next step."""
        _, num_waiting = self.scheduler.get_request_counts()
        return bool(num_waiting or self._prefilling or self._waiting.any_returning)

    def relieve(self, request: Request) -> bool:
        """Compress the prompt that frees most, because ``request`` gets no blocks."""
        runs = request in self.scheduler.running
        return self._compress_largest(Outcome.INSTEAD_OF_PREEMPTION if runs else Outcome.PRESSURE)

    def clip(self, request: Request, start: int, num_new_tokens: int) -> int:
        """Tokens of a request that fit into this step: [start, start + the result).

        A step ends where the request was, or will be, compressed; and it does not bring rows that
        a method looks at while the workers have no room to keep them.
        """
        tracked = self.manager.compressed.track(request)
        plan = tracked.plan
        if not plan.compresses or tracked.compressed:
            return num_new_tokens
        prompt_end = request.num_prompt_tokens if tracked.when.always else None
        boundary = self.boundaries.get(request.request_id, prompt_end)
        if boundary is not None and start < boundary:
            num_new_tokens = min(num_new_tokens, boundary - start)
        if not plan.looks_at(start, start + num_new_tokens):
            return num_new_tokens
        compressed = self.manager.compressed
        self._took_entry.append(tracked)
        if compressed.take_entry(tracked):
            return num_new_tokens
        if self._compress_largest(Outcome.PRESSURE, needs_entry=True):
            compressed.take_entry(tracked)
            return num_new_tokens
        return max(0, plan.first_row - start)

    def end_step(self, output: SchedulerOutput) -> StepOrders:
        """What the workers must know of this step."""
        tracked = self.manager.compressed.tracked
        for request in self._took_entry:
            self.manager.compressed.return_entry(request)
        self._took_entry = []
        entering = [new.req_id for new in output.scheduled_new_reqs]
        entering += output.scheduled_cached_reqs.resumed_req_ids
        for req_id in entering:
            self._prefilling[req_id] = tracked[req_id]
        for req_id in output.finished_req_ids:
            self.boundaries.pop(req_id, None)
            self._waiting.discard(req_id)
        orders = []
        for req_id, order in self.orders.items():
            if req_id in tracked and tracked[req_id].compressed:
                orders.append(order)
                self.boundaries[req_id] = tracked[req_id].request.num_computed_tokens
                # scheduled tokens are counted by now
                self.boundaries[req_id] -= output.num_scheduled_tokens.get(req_id, 0)
        plans = {req_id: tracked[req_id].plan for req_id in entering}
        return StepOrders(
            {req_id: plan for req_id, plan in plans.items() if plan.compresses}, orders
        )

    def settle(self, output: SchedulerOutput, found: ModelRunnerOutput) -> None:
        """Take rejected drafts of a step back from boundaries that were set while it ran."""
        for req_id in self._unsettled & output.num_scheduled_tokens.keys():
            self._unsettled.discard(req_id)
            drafts = output.scheduled_spec_decode_tokens.get(req_id, [])
            if req_id in self.boundaries and drafts and found.sampled_token_ids:
                sampled = found.sampled_token_ids[found.req_id_to_index[req_id]]
                # nothing is sampled where vLLM throws the step away: it takes nothing back either
                self.boundaries[req_id] -= len(drafts) + 1 - len(sampled) if sampled else 0

    def report(self, request: Request) -> dict[str, str | int] | None:
        """What has become of a request that asked for something of its own, else None."""
        compressed = self.manager.compressed
        tracked = compressed.tracked.get(request.request_id)
        asked = tracked is not None and tracked.settings.asked
        return compressed.report(tracked) if tracked is not None and asked else None

    # parts of them

    def _is_due(self, tracked: TrackedRequest) -> bool:
        request = tracked.request
        boundary = self.boundaries.get(request.request_id)
        if boundary is None and not tracked.when.always:
            return False
        return request.num_computed_tokens >= (boundary or 0) and self._goes_on(request)

    def _goes_on(self, request: Request) -> bool:
        """Whether it will compute further tokens, as far as the scheduler can know."""
        last = request.num_prompt_tokens + request.max_tokens
        last = min(last, self.scheduler.max_model_len)
        if request.num_output_placeholders == 0:
            return request.num_computed_tokens + 1 < last
        return request.num_computed_tokens + 2 - request.num_output_placeholders < last

    def _compress(self, tracked: TrackedRequest, outcome: Outcome) -> None:
        req_id = tracked.request.request_id
        self._waiting.discard(req_id)
        if tracked.request.num_output_placeholders > 1:
            self._unsettled.add(req_id)
        self.orders[req_id] = self.manager.compressed.compress(tracked, outcome)

    def _compress_largest(
        self, outcome: Outcome, needs_entry: bool = False, usage: float | None = None
    ) -> bool:
        """Compress the waiting prompt that frees most blocks; False if there is none that helps.

        Args:
            usage: of the pool, where only prompts with a mark below it are meant.
        """
        compressed = self.manager.compressed
        best, most = None, 0.0
        bounds = sorted(self._waiting.prompts(), key=lambda t: -t.plan.num_freed_blocks)
        for tracked in bounds:
            if tracked.plan.num_freed_blocks <= most:  # no later one frees more
                break
            if not self._may_compress(tracked) or (needs_entry and not tracked.holds_entry):
                continue
            if usage is not None and not tracked.when.wants(usage):
                continue
            gain = compressed.share_of_blocks(tracked)
            if gain > most or (needs_entry and best is None):
                best, most = tracked, gain
        if best is None:
            return False
        self._compress(best, outcome)
        return True

    def _may_compress(self, tracked: TrackedRequest) -> bool:
        """Whether it still needs its cache, and has replayed what it computed before."""
        request = tracked.request
        req_id = request.request_id
        if self.manager.compressed.tracked.get(req_id) is not tracked:
            return False
        if not self._goes_on(request):
            return False
        boundary = self.boundaries.get(req_id)
        if boundary is not None:
            return request.num_computed_tokens >= boundary
        return not request.is_prefill_chunk  # vLLM says so of replayed outputs, too


class _CompressedScheduler(Scheduler):
    """Adds the policy to one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compression = CompressionPolicy(self)
        self._splits_for_mamba = self.need_mamba_block_aligned_split

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.compression.begin_step()
        # vLLM offers the one hook that ends a step at a chosen position to Mamba layers only
        self.need_mamba_block_aligned_split = self._splits_for_mamba or self.compression.may_clip
        output = super().schedule(*args, **kwargs)
        vars(output)[ATTRIBUTE] = self.compression.end_step(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        self.compression.settle(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM hands its client what this returns first, as the request's KV parameters."""
        report = self.compression.report(request)
        params, *others = super()._free_request(request, *args, **kwargs)
        if report is not None:
            params = {**(params or {}), CONFIG_KEY: report}
        return params, *others

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, *computed: int
    ) -> int:
        if self._splits_for_mamba:
            num_new_tokens = super()._mamba_block_aligned_split(request, num_new_tokens, *computed)
        start = request.num_computed_tokens + sum(computed)
        return self.compression.clip(request, start, num_new_tokens)


class CompressedScheduler(_CompressedScheduler):
    """vLLM's scheduler with compression."""


class CompressedAsyncScheduler(_CompressedScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler with compression."""
