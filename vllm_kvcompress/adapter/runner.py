# SPDX-License-Identifier: Apache-2.0
"""What a worker knows about the requests of the step it runs, for both of vLLM's model runners.

An attention metadata builder sees lengths and block tables but no requests. Wrapping the runners'
``execute_model`` tells which runner is at work and which requests have left; the rest is read from
the runner's own tables when the builder asks.
"""

import contextvars
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

from vllm_kvcompress.adapter import attention_inputs
from vllm_kvcompress.adapter.kv_cache import CompressedSpec, prompt_facts
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.settings import settings_of
from vllm_kvcompress.batch import StepRows
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.plan import BlockPlanner, PromptPlan


class RequestSlots:
    """Numbers for requests, stable from their first step to their last.

    A preempted request loses its slot and comes back as a new one: nothing that was kept for its
    first life may be seen in its second.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: dict[str, int] = {}
        self.left: set[str] = set()

    def assign(self, req_ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Slots [R] int64 of the requests, and the rows [F] of those that are new."""
        known = self._slot_of
        fresh = [row for row, req_id in enumerate(req_ids) if req_id not in known]
        for row in fresh:
            known[req_ids[row]] = self._free.pop()
        slots = np.array([known[req_id] for req_id in req_ids], dtype=np.int64)
        return slots, np.array(fresh, dtype=np.int64)

    def release(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            slot = self._slot_of.pop(req_id, None)
            if slot is not None:
                self._free.append(slot)
                self.left.add(req_id)

    def take_left(self) -> set[str]:
        """Requests released since the last call."""
        left, self.left = self.left, set()
        return left


@dataclass
class RunnerState:
    """Our side of one model runner."""

    slots: RequestSlots
    planner: BlockPlanner
    _plans: dict[str, PromptPlan] = field(default_factory=dict)

    def plan(self, runner: "RunnerV1 | RunnerV2", req_id: str, prompt_len: int) -> PromptPlan:
        """The plan of a request, remembered until it leaves."""
        if req_id not in self._plans:
            features = _features_of(runner, req_id)
            self._plans[req_id] = self.planner.plan(prompt_facts(prompt_len, features))
        return self._plans[req_id]

    def release(self, req_ids: Iterable[str]) -> None:
        """These requests have left, or come back as new ones."""
        req_ids = list(req_ids)
        for req_id in req_ids:
            self._plans.pop(req_id, None)
        self.slots.release(req_ids)


@dataclass(frozen=True)
class Step:
    """One call of ``execute_model`` that runs real requests."""

    runner: "RunnerV1 | RunnerV2"
    state: RunnerState

    def rows(self, cam: CommonAttentionMetadata) -> StepRows:
        """The step's rows in batch order, without padding."""
        runner = self.runner
        facts = _facts_v2(runner, cam) if isinstance(runner, RunnerV2) else _facts_v1(runner, cam)
        req_ids, prompt_lens, num_computed = facts
        starts = cam.query_start_loc_cpu.numpy()[: len(req_ids) + 1].astype(np.int64)
        slots, new = self.state.slots.assign(req_ids)
        lens = prompt_lens.tolist()
        fresh = np.zeros(len(req_ids), dtype=bool)
        fresh[new] = True
        return StepRows(
            req_ids=req_ids,
            slots=slots,
            fresh=fresh,
            prompt_lens=prompt_lens.astype(np.int64),
            num_computed=num_computed.astype(np.int64),
            query_lens=starts[1:] - starts[:-1],
            query_starts=starts[:-1],
            plans=[self.state.plan(runner, *r) for r in zip(req_ids, lens, strict=True)],
        )


def _facts_v1(runner: RunnerV1, cam: CommonAttentionMetadata):
    batch = runner.input_batch
    num = batch.num_reqs
    return batch.req_ids[:num], batch.num_prompt_tokens[:num], batch.num_computed_tokens_cpu[:num]


def _facts_v2(runner: RunnerV2, cam: CommonAttentionMetadata):
    states = runner.req_states
    index = cam.req_idx
    assert index is not None, "runner V2 names the request of every row"
    req_ids = [states.index_to_req_id[i] for i in index.tolist()]
    return req_ids, states.prompt_len.np[index], states.num_computed_tokens_np[index]


def _features_of(runner: "RunnerV1 | RunnerV2", req_id: str) -> list[MultiModalFeatureSpec]:
    if isinstance(runner, RunnerV1):
        return runner.requests[req_id].mm_features
    cache = runner.encoder_cache
    return cache.mm_features[req_id] if cache is not None else []


_current: contextvars.ContextVar[Step | None] = contextvars.ContextVar("step", default=None)
_states: "weakref.WeakKeyDictionary[object, RunnerState]" = weakref.WeakKeyDictionary()
"""Runners of compressing engines, once they have a KV cache."""


def current_step() -> Step | None:
    """None in dummy runs and graph capture."""
    return _current.get()


def _follow_requests(original):
    def execute_model(self, scheduler_output, *args, **kwargs):
        dummy = kwargs.get("dummy_run", args[1] if len(args) > 1 else False)
        state = None if dummy else _states.get(self)
        if state is None:
            return original(self, scheduler_output, *args, **kwargs)
        state.release(scheduler_output.finished_req_ids)
        state.release(scheduler_output.preempted_req_ids or ())
        state.release(new.req_id for new in scheduler_output.scheduled_new_reqs)
        token = _current.set(Step(self, state))
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            _current.reset(token)

    return execute_model


def needs_python(
    runner: "RunnerV1 | RunnerV2",
    state: RunnerState,
    req_ids: Sequence[str],
    prompt_lens: np.ndarray,
    num_computed: np.ndarray,
    query_lens: np.ndarray,
) -> bool:
    """Whether some row brings prompt tokens that the methods look at.

    Such a step must not be replayed from a full graph, where our Python does not run.
    """
    for row in np.flatnonzero(num_computed < prompt_lens).tolist():
        plan = state.plan(runner, req_ids[row], int(prompt_lens[row]))
        end = num_computed[row] + query_lens[row]
        first = min(prompt_lens[row] - max(plan.num_rows, 1), plan.stats_from)
        if plan.compresses and end > first:
            return True
    return False


def _veto_full_graph_v2(original):
    def gather_batch_req_state(self, scheduler_output, dummy_run):
        batch, uniform = original(self, scheduler_output, dummy_run)
        state = _states.get(self)
        if batch is None or state is None:
            return batch, uniform
        states, index = self.req_states, batch.idx_mapping_np
        if needs_python(
            self,
            state,
            [states.index_to_req_id[i] for i in index.tolist()],
            states.prompt_len.np[index],
            states.num_computed_tokens_np[index],
            batch.num_scheduled_tokens,
        ):
            # data-parallel ranks agree on the mode after this, so they cannot diverge
            return batch._replace(decode_graph_eligible=False), None
        return batch, uniform

    return gather_batch_req_state


def _veto_full_graph_v1(original):
    def determine(self, num_tokens, num_reqs, num_scheduled_tokens_np, *args, **kwargs):
        step = current_step()
        if step is not None:
            batch = self.input_batch
            if needs_python(
                self,
                step.state,
                batch.req_ids[:num_reqs],
                batch.num_prompt_tokens[:num_reqs],
                batch.num_computed_tokens_cpu[:num_reqs],
                num_scheduled_tokens_np[:num_reqs],
            ):
                kwargs["force_uniform_decode"] = False
        return original(self, num_tokens, num_reqs, num_scheduled_tokens_np, *args, **kwargs)

    return determine


def compressed_spec(kv_cache_config: KVCacheConfig) -> CompressedSpec:
    """The spec of the one group of layers that is compressed.

    Raises:
        KVCompressionError: vLLM would serve this model uncompressed, or in a way we cannot follow.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    found = [spec for spec in specs if isinstance(spec, CompressedSpec)]
    others = {type(spec) for spec in specs} - {CompressedSpec, SlidingWindowSpec}
    if len(found) != 1 or others or found[0].non_causal:
        names = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise KVCompressionError(
            "KV compression needs one group of like causal full-attention layers, beside which "
            f"only sliding-window layers may stand; this model's cache groups are: {names}. Serve "
            "it without --kv-compression, or keep the hybrid KV cache manager on if it was turned "
            "off."
        )
    spec = found[0]
    budget = spec.planner.config.tokens_per_head
    if budget is not None and budget < spec.block_size:
        raise KVCompressionError(
            f"--kv-budget {budget} is smaller than one block, and this model's hybrid "
            f"cache has blocks of {spec.block_size} tokens: set --kv-budget {spec.block_size} or "
            "more."
        )
    return spec


def check_files(vllm_config: VllmConfig, spec: CompressedSpec) -> None:
    """Files among the allocator's options must belong to the model.

    Raises:
        KVCompressionError: one was made for another model.
    """
    parallel = vllm_config.parallel_config
    heads = vllm_config.model_config.get_num_attention_heads(parallel)
    try:
        spec.planner.config.allocation.check_model(
            spec.num_layers, heads * parallel.tensor_parallel_size
        )
    except ValueError as error:
        raise KVCompressionError(f"{spec.planner.config.allocator}: {error}.") from error


def check_whole_blocks(runner: "RunnerV1 | RunnerV2", block_size: int) -> None:
    """Attention kernels must see the blocks that the scheduler counts.

    Raises:
        KVCompressionError: vLLM splits the blocks of the compressed layers for its kernels.
    """
    for groups in runner.attn_groups:
        for group in groups:
            seen = group.get_metadata_builder().kv_cache_spec
            if isinstance(seen, CompressedSpec) and seen.block_size != block_size:
                raise KVCompressionError(
                    f"KV compression needs attention kernels on whole blocks, but vLLM splits "
                    f"blocks of {block_size} tokens into {seen.block_size} for this model: set "
                    f"--block-size {seen.block_size}, or serve it without --kv-compression."
                )


def _know_groups(original):
    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs):
        if settings_of(self.vllm_config) is None:
            original(self, kv_cache_config, *args, **kwargs)
            return
        spec = compressed_spec(kv_cache_config)
        check_files(self.vllm_config, spec)
        slots = RequestSlots(self.vllm_config.scheduler_config.max_num_seqs)
        _states[self] = RunnerState(slots, spec.planner)
        original(self, kv_cache_config, *args, **kwargs)
        check_whole_blocks(self, spec.block_size)

    return initialize_kv_cache


def _hook_attention_inputs(original):
    def get_kv_cache_spec(self):
        attention_inputs.install(self.get_model(), self.vllm_config)  # nothing is compiled yet
        return original(self)

    return get_kv_cache_spec


def install() -> None:
    """Wrap both runners; they behave as before for engines that do not compress."""
    for runner in (RunnerV1, RunnerV2):
        wrap(runner, "execute_model", _follow_requests)
        wrap(runner, "initialize_kv_cache", _know_groups)
        wrap(runner, "get_kv_cache_spec", _hook_attention_inputs)
    wrap(RunnerV1, "_determine_batch_execution_and_padding", _veto_full_graph_v1)
    wrap(RunnerV2, "gather_batch_req_state", _veto_full_graph_v2)
