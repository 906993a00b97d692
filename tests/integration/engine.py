# SPDX-License-Identifier: Apache-2.0
"""Engines inside the test process, and what can be seen in them.

An engine here is vLLM's own ``LLM`` with ``VLLM_ENABLE_V1_MULTIPROCESSING=0``: scheduler, block
pool, model runner and KV tensors are all within reach.
"""

import copy
import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import core

from vllm_kvcompress.adapter.kv_cache import CompressedManager
from vllm_kvcompress.config import KVCompressionConfig

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Method:
    """What an engine is asked to do; ``None`` instead of a Method is stock vLLM."""

    name: str = "snapkv"
    budget: int | str = 96
    window: int = 32
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def additional_config(self) -> dict[str, Any]:
        settings = {"method": self.name, "budget": self.budget, "window": self.window}
        return {"kv_compression": settings | dict(self.options)}


@dataclass(frozen=True)
class Answer:
    """One finished completion."""

    token_ids: list[int]
    logprobs: list[float]  # of the chosen tokens
    finish_reason: str | None = None
    text: str = ""
    num_cached_tokens: int | None = None


_open: set[int] = set()


@contextmanager
def engine(model: str, method: Method | None = None, **settings) -> Iterator[LLM]:
    """An ``LLM`` with small defaults, shut down at the end."""
    llm = make_llm(model, method, **settings)
    try:
        yield llm
    finally:
        close(llm)


def make_llm(model: str, method: Method | None = None, **settings) -> LLM:
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,
        "seed": 0,
    }
    if method is not None:
        defaults["additional_config"] = method.additional_config
    llm = LLM(model, **(defaults | settings))
    _open.add(id(llm))
    return llm


def close(llm: LLM) -> None:
    """Shut down; the process groups that all engines of this process share go with the last one."""
    _open.discard(id(llm))
    alone = nullcontext() if not _open else patch.object(core, "cleanup_dist_env_and_memory")
    with alone:
        llm.llm_engine.engine_core.shutdown()
    gc.collect()


@contextmanager
def scheduling(mode: str):
    """ "async" undoes the CPU platform's veto of asynchronous scheduling."""
    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls, vllm_config):
        original.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    if mode == "async":
        CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


# prompts and requests


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids of printable characters, which every tiny model has."""
    rng = random.Random(1_000_003 * seed + length)
    return [rng.randrange(94) for _ in range(length)]


def greedy(max_tokens: int = 8, **settings) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=1, **settings
    )


def page_prompt(page) -> dict[str, Any]:
    """The chat prompt for one page of examples/tiny-docvqa."""
    return {
        "prompt": "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        f"{page.question}<|im_end|>\n<|im_start|>assistant\n",
        "multi_modal_data": {"image": page.image},
    }


def as_prompt(prompt: Any) -> Any:
    """Token ids or anything ``LLM.generate`` takes."""
    return {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt


def answer_of(output, index: int = 0) -> Answer:
    completion = output.outputs[index]
    chosen = zip(completion.token_ids, completion.logprobs or [], strict=False)
    return Answer(
        list(completion.token_ids),
        [step[token].logprob for token, step in chosen],
        completion.finish_reason,
        completion.text,
        output.num_cached_tokens,
    )


def generate(llm: LLM, prompts: Sequence[Any], params: Any = None) -> list[Answer]:
    """Run all prompts as one wave; greedy, 8 tokens, unless ``params`` says otherwise."""
    params = copy.deepcopy(greedy() if params is None else params)  # generate() changes them
    outputs = llm.generate([as_prompt(p) for p in prompts], params, use_tqdm=False)
    return [answer_of(output) for output in outputs]


def assert_same(
    got: Sequence[Answer], expected: Sequence[Any], tolerance: float | None = None
) -> None:
    """Equal tokens and, within float noise, equal log-probabilities, request by request.

    Args:
        expected: answers, or outputs of the oracle.
        tolerance: what log-probabilities may differ by; None: see ``text_tolerance``.
    """
    from float_noise import text_tolerance  # which is measured with an engine of this module

    tolerance = text_tolerance() if tolerance is None else tolerance
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.token_ids == list(b.token_ids), f"request {index}: {a.token_ids} != {b.token_ids}"
        assert len(a.logprobs) == len(b.logprobs) == len(a.token_ids)
        worst = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
        assert worst <= tolerance, f"request {index}: log-probabilities differ by {worst}"


def differ(got: Sequence[Answer], expected: Sequence[Any]) -> bool:
    """Whether at least one request's text or log-probabilities are off."""
    try:
        assert_same(got, expected)
    except AssertionError:
        return True
    return False


class Stepper:
    """Runs an engine step by step, so that a test decides what happens when.

    Attributes:
        done: finished answers by the name the test gave.
        partial: tokens so far.
        prompts: token ids of each prompt, placeholders of images included.
        chunks: prompt tokens computed in each step of a request's prefill.
        peak_running: most requests in the running queue after any step.
        preemptions: requests that the scheduler has preempted so far.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.scheduler = scheduler_of(llm)
        self.done: dict[str, Answer] = {}
        self.partial: dict[str, list[int]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.chunks: dict[str, list[int]] = {}
        self.internal: dict[str, str] = {}
        self.peak_running = 0
        self.preemptions = 0
        self.steps = 0

    def add(
        self, name: str, prompt: Any, params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        params = greedy() if params is None else params
        self.internal[name] = self.engine.add_request(
            name, as_prompt(prompt), params, priority=priority
        )
        request = self.request(name)
        if request is not None:  # with n > 1 only its children are known to the scheduler
            self.prompts[name] = list(request.prompt_token_ids)

    def abort(self, *names: str) -> None:
        self.engine.abort_request(list(names))

    def preempt(self, request) -> None:
        """Take a running request's blocks, as ``reset_prefix_cache`` does with all of them."""
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
        self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    def request(self, name: str):
        """vLLM's request; None once it has left the scheduler."""
        return self.scheduler.requests.get(self.internal[name])

    def num_computed(self, name: str) -> int:
        request = self.request(name)
        return request.num_computed_tokens if request is not None else -1

    def step(self) -> None:
        before = {r.request_id: r.num_preemptions for r in self.scheduler.requests.values()}
        computed = {name: self.num_computed(name) for name in self.prompts}
        for output in self.engine.step():
            self.partial[output.request_id] = list(output.outputs[0].token_ids)
            if output.finished:
                self.done[output.request_id] = answer_of(output)
        for request in self.scheduler.requests.values():
            self.preemptions += request.num_preemptions - before.get(request.request_id, 0)
        for name, prompt in self.prompts.items():
            request = self.request(name)
            if request is not None and computed[name] < len(prompt) and not request.num_preemptions:
                end = min(request.num_computed_tokens, len(prompt))
                if end > computed[name]:
                    self.chunks.setdefault(name, []).append(end - computed[name])
        self.peak_running = max(self.peak_running, len(self.scheduler.running))
        self.steps += 1

    def run_until(self, condition, limit: int = 2000) -> None:
        """Step until ``condition()``; at most ``limit`` steps."""
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"nothing came of it in {limit} steps")

    def run(self) -> dict[str, Answer]:
        """Step until every request is finished."""
        self.run_until(lambda: not self.engine.has_unfinished_requests(), limit=20_000)
        self.flush()
        return self.done

    def flush(self) -> None:
        """Let the worker hear of the last requests that left."""
        core = self.engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            self.engine.step()


# what is inside


def scheduler_of(llm: LLM) -> Scheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def block_pool(llm: LLM):
    return scheduler_of(llm).kv_cache_manager.block_pool


def free_blocks(llm: LLM) -> int:
    return block_pool(llm).get_num_free_blocks()


def held_blocks(stepper: Stepper, name: str) -> int:
    """Real (not null) blocks in the compressed group's table of one request."""
    blocks = compressed_manager(stepper.llm).req_to_blocks.get(stepper.internal[name], [])
    return sum(not block.is_null for block in blocks)


def cache_stats(llm: LLM) -> tuple[int, int]:
    """(queried, hit) prefix-cache tokens since start, as vLLM reports them on /metrics."""
    values = {metric.name: metric for metric in llm.get_metrics()}
    return (
        values["vllm:prefix_cache_queries"].value,
        values["vllm:prefix_cache_hits"].value,
    )


def model_runner(llm: LLM):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def compressed_manager(llm: LLM) -> CompressedManager:
    """The scheduler's manager of compressed blocks."""
    return scheduler_of(llm).kv_cache_manager.compressed


def replan(llm: LLM, config: KVCompressionConfig) -> None:
    """Make the scheduler of an idle engine plan by another config, and forget cached blocks."""
    manager = compressed_manager(llm)
    manager.configure(manager.planner.with_config(config))
    assert llm.reset_prefix_cache(), "requests are running"


def compressed_layers(llm: LLM):
    """What the worker keeps for its compressed layers."""
    return llm.llm_engine.model_executor.driver_worker.worker.compressed_layers


def assert_clean(llm: LLM, free_before: int) -> None:
    """No block, slot or entry is held by anybody."""
    assert scheduler_of(llm).get_num_unfinished_requests() == 0
    assert free_blocks(llm) == free_before
    check_pool(block_pool(llm))
    layers, manager = compressed_layers(llm), compressed_manager(llm)
    assert len(layers.slots) == len(layers.waiting.entries) == 0
    assert sorted(layers.slots._free) == list(range(layers.max_num_seqs))
    assert layers.plans == {}
    assert manager.tracked == {}
    assert manager.free_entries == layers.num_entries
    assert scheduler_of(llm).compression.boundaries == {}
    for each in scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers:
        assert not any(each.req_to_blocks.values())
        assert not each.num_cached_block


def check_pool(pool) -> None:
    """Every block is free or referenced, exactly once in the free list, and counts add up."""
    free = pool.free_block_queue.get_all_free_blocks()
    ids = [block.block_id for block in free]
    assert len(ids) == len(set(ids)) == pool.get_num_free_blocks()
    assert all(block.ref_cnt == 0 for block in free)
    held = [b for b in pool.blocks if b.ref_cnt > 0 and not b.is_null]
    assert len(held) + len(free) + 1 == pool.num_gpu_blocks  # the null block is neither
    for key, cached in pool.cached_block_hash_to_block._cache.items():
        for block in cached.values() if isinstance(cached, dict) else [cached]:
            assert block.block_hash == key
            assert not block.is_null
