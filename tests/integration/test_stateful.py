# SPDX-License-Identifier: Apache-2.0
"""Random lives of requests on vLLM's real scheduler and block pool, with a ghost for the worker.

The scheduler (synchronous or asynchronous), KVCacheManager, BlockPool and requests are vLLM's own,
the spec and manager are ours. Only the GPU is played, see ``ghost_worker``.
"""

import collections
import functools
import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from engine import check_pool, scheduling
from ghost_worker import Ghost
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvcompress.adapter import kv_cache
from vllm_kvcompress.adapter.kv_cache import CompressedSpec, TrackedRequest
from vllm_kvcompress.adapter.scheduler import (
    CompressedAsyncScheduler,
    CompressedScheduler,
    CompressionPolicy,
)
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.orders import ATTRIBUTE
from vllm_kvcompress.plan import PromptPlan
from vllm_kvcompress.prompt import PromptFacts

BLOCK = 16
MAX_LEN = 320
SLIDING = 24
MIN_STEPS = 10_000
STEPS_PER_RUN = 100

init_none_hash(sha256)
_hasher = get_request_block_hasher(BLOCK, sha256)
_total = collections.Counter()

WISHES = (
    {},
    {},
    {},
    {"kv_compression": "off"},
    {"kv_budget": 48},
    {"kv_budget": "25%"},
    {"kv_compression": "snapkv", "kv_budget": "60%"},
    {"kv_compression_when": "always"},
    {"kv_compression_when": "pressure:0.5"},
)
"""What requests choose: each is followed by its own plan."""


@dataclass(frozen=True)
class Setup:
    method: str
    budget: int | str
    window: int
    asynchronous: bool
    prefix_cache: bool
    hybrid: bool
    chunk: int
    when: str
    entries: int

    @property
    def num_blocks(self) -> int:
        """Enough for one request of MAX_LEN tokens, as vLLM demands at start; hardly for two."""
        return 44 if self.hybrid else 30

    @property
    def settings(self) -> dict:
        names = ("method", "budget", "window", "when")
        allow = "off,budget,when,snapkv"
        return {"workspace_mib": 1, "allow": allow, **{name: getattr(self, name) for name in names}}

    def spec(self) -> CompressedSpec:
        base = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32
        )
        return CompressedSpec.of(
            base,
            config=KVCompressionConfig.parse(self.settings),
            kernel_block_size=BLOCK,
            model_kv_heads=2,
            num_layers=2,
            entry_bytes=(1 << 19) // self.entries,
            max_entries=8,
        )


@functools.cache
def engine_config(model: str, setup: Setup):
    with scheduling("async" if setup.asynchronous else "sync"):
        config = EngineArgs(
            model=model,
            max_model_len=MAX_LEN,
            block_size=BLOCK,
            max_num_seqs=6,
            max_num_batched_tokens=setup.chunk,
            enable_prefix_caching=setup.prefix_cache,
            additional_config={"kv_compression": setup.settings},
            skip_tokenizer_init=True,
        ).create_engine_config()
    config.cache_config.num_gpu_blocks = setup.num_blocks
    return config


def make_scheduler(model: str, setup: Setup) -> Scheduler:
    config = engine_config(model, setup)
    groups = [KVCacheGroupSpec(["full"], setup.spec())]
    if setup.hybrid:
        sliding = SlidingWindowSpec(
            block_size=BLOCK,
            num_kv_heads=2,
            head_size=32,
            dtype=torch.float32,
            sliding_window=SLIDING,
        )
        groups += [KVCacheGroupSpec(["sliding"], sliding)]
    caches = KVCacheConfig(setup.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    cls = CompressedAsyncScheduler if setup.asynchronous else CompressedScheduler
    return cls(
        config,
        caches,
        StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """One scheduler, up to two steps in flight."""

    model = ""
    may_wish: tuple[dict, ...] = ({},)

    @initialize(
        # any prefix may be hit; budgets span layers; sums over the prompt, so nothing may be hit
        method=st.sampled_from(["snapkv", "snapkv", "snapkv+pyramid", "h2o+uniform"]),
        budget=st.sampled_from([32, 48, 96, "25%", "60%"]),
        window=st.sampled_from([8, 24]),
        asynchronous=st.booleans(),
        prefix_cache=st.sampled_from([True, True, True, False]),
        hybrid=st.sampled_from([False, False, True]),
        chunk=st.sampled_from([24, 64, 512]),
        when=st.sampled_from(["always", "always", "pressure:0.3", "pressure:0.8"]),
        entries=st.sampled_from([1, 2, 8]),
    )
    def start(self, **choices) -> None:
        self.setup = Setup(**choices)
        self.numbers = itertools.count()
        self.scheduler = make_scheduler(self.model, self.setup)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.full = self.manager.coordinator.single_type_managers[0]
        self.planner = self.setup.spec().planner
        self.wishes: dict[str, dict] = {}
        self.ghost = Ghost(self.plan_of, BLOCK, self.setup.num_blocks, SLIDING)
        self.in_flight: collections.deque = collections.deque()
        self.processed: dict[str, int] = {}
        self.depth = 2 if choices["asynchronous"] else 1
        self.failed = False

    def plan_of(self, req_id: str, prompt_len: int) -> PromptPlan:
        config = self.setup.spec().choices.settings(self.wishes[req_id]).config
        return self.planner.with_config(config).plan(PromptFacts(prompt_len))

    @property
    def alive(self) -> list[Request]:
        return list(self.scheduler.requests.values())

    @precondition(lambda self: len(self.scheduler.requests) < 9)
    @rule(
        stem=st.integers(0, 2),
        shared=st.sampled_from([0, 16, 40, 64, 128, 160]),
        own=st.integers(1, 120),
        answer=st.integers(1, 40),
    )
    def add(self, stem: int, shared: int, own: int, answer: int) -> None:
        number = next(self.numbers)
        prompt = random.Random(stem).choices(range(50), k=160)[:shared]
        prompt += random.Random(number % 7 - 7).choices(range(50), k=own)
        wish = self.may_wish[number % len(self.may_wish)]
        params = SamplingParams(
            max_tokens=min(answer, MAX_LEN - len(prompt)), ignore_eos=True, extra_args=wish
        )
        self.wishes[str(number)] = wish
        params.update_from_generation_config({}, None)
        self.scheduler.add_request(Request(str(number), prompt, params, None, block_hasher=_hasher))
        _total["requests"] += 1

    @precondition(lambda self: self.scheduler.has_requests() and len(self.in_flight) < self.depth)
    @rule()
    def schedule(self) -> None:
        before = {r.request_id: r.num_computed_tokens for r in self.alive}
        output = self.scheduler.schedule()
        self.in_flight.append(output)
        orders = vars(output)[ATTRIBUTE].compress
        assert all(before[order.req_id] >= order.plan.facts.length for order in orders)
        _total["compressed"] += len(orders)
        for req_id in output.num_scheduled_tokens:
            request, tracked = self.scheduler.requests[req_id], self.full.tracked[req_id]
            blocks, plan = self.full.req_to_blocks[req_id], tracked.plan
            assert plan == self.plan_of(req_id, request.num_prompt_tokens)
            if not plan.config.when.always:
                _total["not yet compressed"] += before[req_id] > request.num_prompt_tokens
            elif plan.compresses:
                ended = before[req_id] >= request.num_prompt_tokens
                assert tracked.compressed == ended, "compressed at the next step, not any other"
            freed = plan.num_freed_blocks if tracked.compressed else 0
            nulls = [block.is_null for block in blocks]
            assert nulls == [index < freed for index in range(len(blocks))]
        _total["hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        _total["preemptions"] += len(output.preempted_req_ids or ())
        if not self.scheduler.scheduler_config.async_scheduling:
            self.finish()

    @precondition(lambda self: self.in_flight)
    @rule()
    def finish(self) -> None:
        self.failed = True
        output = self.in_flight.popleft()
        self.scheduler.update_from_output(output, self.ghost.run(output))
        self.failed = False

    @precondition(lambda self: self.scheduler.has_requests())
    @rule(count=st.integers(2, 12))
    def advance(self, count: int) -> None:
        """Several steps in a row, as far ahead as the scheduler goes."""
        for _ in range(count):
            while len(self.in_flight) >= self.depth:
                self.finish()
            if self.scheduler.has_requests():
                self.schedule()
            self.check_integrity()

    @precondition(lambda self: len(self.scheduler.running) > 1)
    @rule(index=st.integers(0, 5))
    def preempt(self, index: int) -> None:
        running = self.scheduler.running
        request = running.pop(index % len(running))
        self.scheduler._preempt_request(request, 0.0, drop_stale_output=True)
        self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    @precondition(lambda self: len(self.scheduler.requests) > 4)
    @rule(index=st.integers(0, 8))
    def abort(self, index: int) -> None:
        alive = self.alive
        request = alive[index % len(alive)]
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        _total["aborted"] += 1

    @precondition(lambda self: len(self.scheduler.running) > 2)
    @rule(preempt=st.sampled_from([False, False, False, True]))
    def reset_prefix_cache(self, preempt: bool) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=preempt)

    @invariant()
    def check_integrity(self) -> None:
        if not hasattr(self, "pool"):
            return
        _total["steps"] += 1
        check_pool(self.pool)
        references = collections.Counter()
        for manager in self.manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                references.update(b.block_id for b in blocks if not b.is_null)
        for block in self.pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == references[block.block_id]
        holders = sum(tracked.holds_entry for tracked in self.full.tracked.values())
        assert self.full.free_entries == self.setup.entries - holders >= 0
        for req_id, blocks in self.full.req_to_blocks.items():
            request = self.scheduler.requests[req_id]
            plan = self.plan_of(req_id, request.num_prompt_tokens)
            if not plan.compresses:
                continue
            for block in blocks[plan.num_freed_blocks :]:
                assert block.ref_cnt == 1, "a private block is shared"
                assert block.block_hash is None, "a private block is in the prefix cache"

    def teardown(self) -> None:
        if not hasattr(self, "pool") or self.failed:  # what failed shall not be hidden
            return
        for _ in range(5_000):
            if self.in_flight:
                self.finish()
            elif self.scheduler.has_requests():
                self.schedule()
            else:
                break
        assert not self.scheduler.requests
        assert self.pool.get_num_free_blocks() == self.setup.num_blocks - 1
        assert not any(self.full.req_to_blocks.values())
        assert not self.full.tracked
        assert self.full.free_entries == self.setup.entries
        self.check_integrity()


def run_machine(max_examples: int, shrink: bool = True) -> None:
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=STEPS_PER_RUN,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def machine(checkpoint):
    SchedulerMachine.model = checkpoint("llama")
    _total.clear()


def test_random_lives(capsys, monkeypatch):
    monkeypatch.setattr(SchedulerMachine, "may_wish", WISHES)
    run_machine(80)
    with capsys.disabled():
        print(f"\n{_total['steps']} scheduler steps checked: {dict(_total)}")
    assert _total["steps"] >= MIN_STEPS
    for event in ("compressed", "not yet compressed", "hits", "preemptions", "aborted"):
        assert _total[event] > 200, f"{event} hardly happened"


def _hash_everything():
    return kv_cache.CompressedManager, "cache_blocks", FullAttentionManager.cache_blocks


def _hit_everything():
    original = FullAttentionManager.__dict__["find_longest_cache_hit"]
    return kv_cache.CompressedManager, "find_longest_cache_hit", original


def _free_one_block_too_many():
    def remove(self, request_id, first, last):
        FullAttentionManager._remove_blocks_in_range(self, request_id, first, last + 1)

    return kv_cache.CompressedManager, "_remove_blocks_in_range", remove


def _forget_to_free():
    def remove(self, request_id, first, last):
        pass

    return kv_cache.CompressedManager, "_remove_blocks_in_range", remove


def _compress_before_the_prompt_ends():
    def is_prefilled(self):
        return self.request.num_computed_tokens >= self.request.num_prompt_tokens - 1

    return TrackedRequest, "is_prefilled", property(is_prefilled)


def _name_other_blocks():
    original = kv_cache.CompressedManager.compress

    def compress(self, *args):
        order = original(self, *args)
        return order._replace(block_ids=order.block_ids[::-1])

    return kv_cache.CompressedManager, "compress", compress


def _drop_orders():
    original = CompressionPolicy.end_step

    def end_step(self, output):
        orders = original(self, output)
        orders.compress.clear()
        return orders

    return CompressionPolicy, "end_step", end_step


def _send_orders_a_step_late():
    original, late = CompressionPolicy.end_step, {}

    def end_step(self, output):
        orders = original(self, output)
        late[self], orders.compress = orders.compress, late.get(self, [])
        return orders

    return CompressionPolicy, "end_step", end_step


def _forget_boundaries():
    original = CompressionPolicy.end_step

    def end_step(self, output):
        orders = original(self, output)
        self.boundaries.clear()
        return orders

    return CompressionPolicy, "end_step", end_step


def _keep_entries_of_waiting_requests():
    return kv_cache.CompressedManager, "return_entry", lambda self, tracked: None


def _do_not_split():
    return CompressionPolicy, "clip", lambda self, request, start, num_new_tokens: num_new_tokens


def _forget_entries():
    return kv_cache.CompressedManager, "_release_entry", lambda self, tracked: None


@pytest.mark.parametrize(
    "mutation",
    [
        _hash_everything,
        _hit_everything,
        _free_one_block_too_many,
        _forget_to_free,
        _compress_before_the_prompt_ends,
        _name_other_blocks,
        _drop_orders,
        _send_orders_a_step_late,
        _forget_boundaries,
        _do_not_split,
        _forget_entries,
        _keep_entries_of_waiting_requests,
    ],
)
def test_mutations_are_noticed(monkeypatch, mutation):
    monkeypatch.setattr(*mutation())
    with pytest.raises((AssertionError, LookupError)):
        run_machine(400, shrink=False)  # stops at the first
