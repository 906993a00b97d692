# SPDX-License-Identifier: Apache-2.0
"""Everything that can happen to a request between its arrival and its end."""

import functools
import random

import pytest
from engine import (
    Method,
    Stepper,
    assert_clean,
    assert_same,
    compressed_layers,
    differ,
    engine,
    free_blocks,
    generate,
    greedy,
    random_prompt,
    scheduler_of,
    scheduling,
)
from float_noise import text_tolerance
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_kvcompress.adapter.kv_cache import CompressedManager
from vllm_kvcompress.adapter.layers import CompressedLayers
from vllm_kvcompress.orders import ATTRIBUTE

METHODS = [
    Method("snapkv", 96),
    Method("bacon+adakv", 96, options=(("alpha", 0.0),)),
]
by_name = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
LENGTHS = (290, 333, 200, 256, 410, 129, 70, 225)
PROMPTS = [random_prompt(length, seed=31) for length in LENGTHS]
DECODE = 60
# these do not need much to be admitted, and grow a lot
STORM = [random_prompt(length, seed=32) for length in (130, 200, 163, 224, 101, 97, 256, 140)]
STORM_DECODE = 120


@functools.cache
def uncontended(model: str, method: Method, max_tokens: int = DECODE):
    with engine(model, method, enable_prefix_caching=False) as llm:
        return generate(llm, PROMPTS, greedy(max_tokens))


@functools.cache
def calm(model: str, method: Method):
    with engine(model, method, enable_prefix_caching=False) as llm:
        return generate(llm, STORM, greedy(STORM_DECODE))


by_pair = pytest.mark.parametrize(
    ("method", "mode"),
    [(METHODS[0], "sync"), (METHODS[1], "async")],
    ids=lambda value: getattr(value, "name", value),
)
"""Where the two have nothing to do with each other."""

by_scheduling = pytest.mark.parametrize("mode", ["sync", "async"])


@pytest.mark.parametrize(
    ("method", "mode", "chunk"),
    [
        (METHODS[0], "sync", 96),
        (METHODS[0], "async", 2048),
        (METHODS[1], "sync", 2048),
        (METHODS[1], "async", 96),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_preemption_storm(checkpoint, method, mode, chunk):
    """A pool far too small for all: requests lose their blocks at any point, again and again."""
    model = checkpoint("llama")
    rng = random.Random(5)
    with (
        scheduling(mode),
        engine(
            model,
            method,
            num_gpu_blocks_override=15,
            max_model_len=384,
            max_num_batched_tokens=chunk,
        ) as llm,
    ):
        free = free_blocks(llm)
        assert isinstance(scheduler_of(llm), AsyncScheduler) == (mode == "async")
        stepper = Stepper(llm)
        for index, prompt in enumerate(STORM):
            stepper.add(str(index), prompt, greedy(STORM_DECODE))
        forced = 0
        while llm.llm_engine.has_unfinished_requests():
            stepper.step()
            if stepper.scheduler.running and forced < 60 and rng.random() < 0.2:
                stepper.preempt(rng.choice(stepper.scheduler.running))
                forced += 1
        stepper.run()
        assert forced == 60
        assert stepper.preemptions > 0
        assert_clean(llm, free)
    assert_same([stepper.done[str(index)] for index in range(len(STORM))], calm(model, method))


@by_name
@by_scheduling
def test_preempted_after_every_step(checkpoint, method, mode):
    """All running requests are preempted after step k, for every k of their life."""
    model = checkpoint("llama")
    expected = uncontended(model, method, 12)[:3]
    with scheduling(mode), engine(model, method, max_num_batched_tokens=128) as llm:
        free = free_blocks(llm)
        for steps in range(1, 18):
            stepper = Stepper(llm)
            for index in range(3):
                stepper.add(str(index), PROMPTS[index], greedy(12))
            for _ in range(steps):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            stepper.run()
            assert_same([stepper.done[str(index)] for index in range(3)], expected)
            assert_clean(llm, free)


def test_preempted_twice(checkpoint):
    """Again while the outputs of the first life are replayed, in chunks of 7 tokens."""
    model, method = checkpoint("llama"), METHODS[1]
    prompt = PROMPTS[2]
    with engine(model, method, enable_prefix_caching=False) as llm:
        expected = generate(llm, [prompt], greedy(40))
    with engine(model, method, max_num_batched_tokens=7, max_num_seqs=1) as llm:
        stepper = Stepper(llm)
        stepper.add("a", prompt, greedy(40))
        stepper.run_until(lambda: len(stepper.partial.get("a", ())) == 30)
        for _ in range(2):
            llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            stepper.run_until(lambda: stepper.num_computed("a") > len(prompt) + 10)
        stepper.run()
        assert_same([stepper.done["a"]], expected)


def test_priority_preemption(checkpoint):
    """The victim is not the last of the batch, so rows move in the worker's tables."""
    model, method = checkpoint("llama"), METHODS[1]
    with engine(
        model, method, num_gpu_blocks_override=15, max_model_len=384, scheduling_policy="priority"
    ) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        for index, prompt in enumerate(STORM):
            stepper.add(str(index), prompt, greedy(STORM_DECODE), priority=index * 5 % 8)
        stepper.run()
        assert stepper.preemptions > 0
        assert_clean(llm, free)
    assert_same([stepper.done[str(index)] for index in range(len(STORM))], calm(model, method))


PHASES = {
    "waiting": lambda s: s.num_computed("victim") == 0,
    "mid-prefill": lambda s: 0 < s.num_computed("victim") <= 258 - 32,
    "inside the window": lambda s: 258 - 32 < s.num_computed("victim") < 258,
    "right after prefill": lambda s: s.num_computed("victim") == 258,
    "decode": lambda s: s.num_computed("victim") == 258 + 9,
}


@by_pair
@pytest.mark.parametrize("phase", PHASES)
def test_abort(checkpoint, shared_engine, method, mode, phase):
    """Neighbours do not notice, and nothing of the victim stays."""
    llm = shared_engine(method, mode)
    free = free_blocks(llm)
    victim = random_prompt(258, seed=33)
    stepper = Stepper(llm)
    stepper.add("before", PROMPTS[2], greedy(40))
    stepper.step()
    stepper.step()
    stepper.step()
    stepper.add("victim", victim, greedy(40))
    stepper.add("after", PROMPTS[3], greedy(40))
    # 48 tokens a step, one for the decode: the victim's chunks end at 47, 94, 141, 188, 235, 258
    stepper.run_until(lambda: PHASES[phase](stepper), limit=40)
    if phase == "inside the window" and mode == "sync":
        assert stepper.internal["victim"] in compressed_layers(llm).waiting.entries
    stepper.abort("victim")
    stepper.run()
    assert "victim" not in stepper.done or stepper.done["victim"].finish_reason == "abort"
    expected = uncontended(checkpoint("llama"), method)
    assert_same(
        [stepper.done["before"], stepper.done["after"]],
        [first(expected[2], 40), first(expected[3], 40)],
    )
    assert_clean(llm, free)


@pytest.fixture(scope="module")
def shared_engine(checkpoint):
    """One engine per method and scheduler, chunks of 48 tokens, no prefix cache."""
    stack, made = [], {}

    def get(method: Method, mode: str):
        if (method, mode) not in made:
            with scheduling(mode):
                opened = engine(
                    checkpoint("llama"),
                    method,
                    max_num_batched_tokens=48,
                    enable_prefix_caching=False,
                )
                made[method, mode] = opened.__enter__()
                stack.append(opened)
        return made[method, mode]

    yield get
    for opened in stack:
        opened.__exit__(None, None, None)


def first(answer, count: int):
    """The start of a longer answer."""
    return type(answer)(answer.token_ids[:count], answer.logprobs[:count])


@by_pair
def test_parallel_sampling(checkpoint, method, mode):
    """n=3 with a seed equals three requests with the seeds vLLM gives its children.

    Whole prompts: for a seeded request in the middle of its prompt vLLM rewinds the generator,
    which CPU generators of torch cannot do.
    """

    def sampling(n: int, seed: int) -> SamplingParams:
        return SamplingParams(n=n, seed=seed, temperature=1.0, max_tokens=12, ignore_eos=True)

    prompt = {"prompt_token_ids": PROMPTS[1]}
    with scheduling(mode), engine(checkpoint("llama"), method) as llm:
        free = free_blocks(llm)
        (output,) = llm.generate([prompt], sampling(3, 70), use_tqdm=False)
        together = [list(completion.token_ids) for completion in output.outputs]
        apart = [
            list(llm.generate([prompt], sampling(1, seed), use_tqdm=False)[0].outputs[0].token_ids)
            for seed in (70, 71, 72)
        ]
        assert together == apart
        assert len({tuple(tokens) for tokens in together}) == 3
        Stepper(llm).flush()
        assert_clean(llm, free)


@by_pair
def test_streaming(checkpoint, shared_engine, method, mode):
    """Deltas add up to the answer, one token per step."""
    llm = shared_engine(method, mode)
    params = greedy(40, output_kind=RequestOutputKind.DELTA)
    request = llm.llm_engine.add_request("s", {"prompt_token_ids": PROMPTS[0]}, params)
    assert request
    deltas = []
    while llm.llm_engine.has_unfinished_requests():
        deltas += [list(output.outputs[0].token_ids) for output in llm.llm_engine.step()]
    assert all(len(delta) <= 1 for delta in deltas)
    expected = uncontended(checkpoint("llama"), method)[0]
    assert [token for delta in deltas for token in delta] == expected.token_ids[:40]


@by_name
@by_scheduling
def test_short_answers_and_stops(checkpoint, shared_engine, method, mode):
    """max_tokens=1, stop strings and stop tokens: the request leaves at once."""
    llm = shared_engine(method, mode)
    free = free_blocks(llm)
    expected = uncontended(checkpoint("llama"), method)
    one = generate(llm, PROMPTS, greedy(1))
    assert_same(one, [first(answer, 1) for answer in expected])
    stop = expected[0].text[5:8]
    (stopped,) = generate(llm, PROMPTS[:1], greedy(DECODE, stop=[stop]))
    assert (stopped.finish_reason, stopped.text) == ("stop", expected[0].text[:5])
    token = expected[3].token_ids[0]
    (stopped,) = generate(llm, PROMPTS[3:4], greedy(DECODE, stop_token_ids=[token]))
    assert stopped.token_ids == [token]
    assert_same(generate(llm, PROMPTS[:4], greedy(20)), [first(a, 20) for a in expected[:4]])
    Stepper(llm).flush()
    assert_clean(llm, free)


def test_prompt_logprobs(checkpoint, shared_engine):
    """Asked for, they come from the uncompressed prompt: equal to stock vLLM's."""
    params = greedy(4, prompt_logprobs=1)
    settings = {"max_num_batched_tokens": 48, "enable_prefix_caching": False}
    llm = shared_engine(METHODS[0], "sync")

    def prompt_logprobs(llm):
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
        return [
            step[token].logprob
            for step, token in zip(output.prompt_logprobs, PROMPTS[0], strict=True)
            if step is not None
        ]

    ours = prompt_logprobs(llm)
    with engine(checkpoint("llama"), **settings) as llm:
        assert ours == pytest.approx(prompt_logprobs(llm), abs=text_tolerance())


def _ignore_orders(monkeypatch):
    monkeypatch.setattr(CompressedLayers, "compress", lambda self, orders: None)


def _compress_after_the_forward_pass(monkeypatch):
    begin, end, late = CompressedLayers.begin_step, CompressedLayers.end_step, []

    def begin_step(self, output):
        orders = vars(output)[ATTRIBUTE]
        late[:], orders.compress = orders.compress, []
        begin(self, output)

    def end_step(self):
        end(self)
        self.compress(late)

    monkeypatch.setattr(CompressedLayers, "begin_step", begin_step)
    monkeypatch.setattr(CompressedLayers, "end_step", end_step)


def _name_other_blocks(monkeypatch):
    original = CompressedManager.compress

    def compress(self, *args):
        order = original(self, *args)
        return order._replace(block_ids=order.block_ids[1:] + order.block_ids[:1])

    monkeypatch.setattr(CompressedManager, "compress", compress)


def _free_one_block_too_many(monkeypatch):
    original = CompressedManager._remove_blocks_in_range

    def remove(self, request_id, first, last):
        original(self, request_id, first, last + 1)

    monkeypatch.setattr(CompressedManager, "_remove_blocks_in_range", remove)


@pytest.mark.parametrize(
    "mutation",
    [
        _ignore_orders,
        _compress_after_the_forward_pass,
        _name_other_blocks,
        _free_one_block_too_many,
    ],
)
def test_mutations_are_noticed(checkpoint, monkeypatch, mutation):
    model, method = checkpoint("llama"), METHODS[1]
    expected = uncontended(model, method)
    mutation(monkeypatch)
    with engine(
        model,
        method,
        num_gpu_blocks_override=20,
        max_model_len=512,
        max_num_batched_tokens=96,
        enable_prefix_caching=False,
    ) as llm:
        assert differ(generate(llm, PROMPTS, greedy(DECODE)), expected)
