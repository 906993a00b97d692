# SPDX-License-Identifier: Apache-2.0
"""Run by test_runner_v2.py in a process of its own, where Model Runner V2 is at work."""

import functools
import random
from pathlib import Path

import pytest
import tiny_shared_kv
from drafting import Guesser, acceptance
from engine import (
    Method,
    Stepper,
    assert_clean,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    page_prompt,
    random_prompt,
    scheduler_of,
    scheduling,
)
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "snapkv": Method("snapkv", 64),
    "bacon+adakv": Method("bacon+adakv", 96, options=(("alpha", 0.0), ("mode", "rel"))),
    "large-window": Method("snapkv+adakv", 160, window=100, options=(("alpha", 0.0),)),
}
SETTINGS = {"max_model_len": 512, "max_num_seqs": 6}
STEM = random_prompt(128, seed=51)
PROMPTS = [random_prompt(length, seed=51) for length in (321, 200, 40, 1, 256)]
PROMPTS.append(STEM + random_prompt(150, seed=52))
PARAMS = [greedy(4 + index) for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return checkpoint("llama", layers=2)


@functools.cache
def oracle_of(model: str) -> Oracle:
    return Oracle(model)


@functools.cache
def expected(model: str, method: Method) -> list:
    scorer, _, allocator = method.name.partition("+")
    config = OracleConfig(
        budget=method.budget,
        scorer=scorer,
        allocator=allocator or "uniform",
        window=method.window,
        **dict(method.options),
    )
    return [
        oracle_of(model).generate(prompt, params.max_tokens, config)
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


@pytest.mark.parametrize(("family", "chunk"), [("llama", 64), ("gemma3", 2048)])
def test_budget_covers_prompt(checkpoint, family, chunk):
    model = checkpoint(family, layers=6 if family == "gemma3" else 2)
    settings = SETTINGS | {"max_num_batched_tokens": chunk}
    with engine(model, **settings) as llm:
        stock = generate(llm, PROMPTS, PARAMS), generate(llm, PROMPTS, PARAMS)
    with engine(model, Method("bacon+adakv", 512), **settings) as llm:
        assert isinstance(model_runner(llm), RunnerV2)
        assert_same(generate(llm, PROMPTS, PARAMS), stock[0])
        assert_same(generate(llm, PROMPTS, PARAMS), stock[1])


@pytest.mark.parametrize(
    ("name", "mode", "chunk"),
    [
        ("snapkv", "sync", 64),
        ("bacon+adakv", "async", 64),
        ("bacon+adakv", "sync", 2048),
        ("large-window", "async", 64),
    ],
)
def test_equals_oracle(model, name, mode, chunk):
    method = METHODS[name]
    with (
        scheduling(mode),
        engine(model, method, max_num_batched_tokens=chunk, **SETTINGS) as llm,
    ):
        assert isinstance(scheduler_of(llm), AsyncScheduler) == (mode == "async")
        free = free_blocks(llm)
        assert_same(generate(llm, PROMPTS, PARAMS), expected(model, method))
        repeated = generate(llm, PROMPTS[::-1], PARAMS[::-1])
        assert_same(repeated, expected(model, method)[::-1])
        assert repeated[0].num_cached_tokens >= 64
        Stepper(llm).flush()
        assert_clean(llm, free)


@pytest.mark.parametrize(
    ("name", "busy"),
    [("snapkv", True), ("bacon+adakv", False), ("bacon+adakv", True), ("large-window", False)],
)
def test_last_chunk_of_one_token(model, name, busy):
    """A chunk of one token looks like a decode to the runner."""
    method = METHODS[name]
    with engine(model, method, max_num_batched_tokens=64 + busy, **SETTINGS) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        if busy:
            stepper.add("decode", PROMPTS[1], greedy(40))
            stepper.run_until(lambda: "decode" in stepper.partial)
        stepper.add("a", PROMPTS[0], PARAMS[0])
        stepper.run()
        assert stepper.chunks["a"] == [64] * 5 + [1]
        assert_same([stepper.done["a"]], expected(model, method)[:1])
        assert_clean(llm, free)


@pytest.mark.parametrize(("mode", "phase"), [("sync", 1), ("async", 2)])
def test_preempted_after_a_step(model, mode, phase):
    """On this runner a preempted request comes back as a new one."""
    method = METHODS["bacon+adakv"]
    with (
        scheduling(mode),
        engine(model, method, max_num_batched_tokens=96, **SETTINGS) as llm,
    ):
        free = free_blocks(llm)
        for steps in range(phase, 14, 3):
            stepper = Stepper(llm)
            for index, prompt in enumerate(PROMPTS):
                stepper.add(str(index), prompt, PARAMS[index])
            for _ in range(steps):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            stepper.run()
            answers = [stepper.done[str(index)] for index in range(len(PROMPTS))]
            assert_same(answers, expected(model, method))
            assert_clean(llm, free)


def speculation(mode: str) -> dict:
    method = {"sync": "ngram", "async": "ngram_gpu"}[mode]
    return {"method": method, "num_speculative_tokens": 3}


def draft(patch: pytest.MonkeyPatch, model: str) -> None:
    """Let some of the drafts be right, the same ones each time."""
    answers = expected(model, METHODS["bacon+adakv"])
    known = [[*prompt, *answer.token_ids] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    patch.setattr(NgramGPUSpeculator, "propose", Guesser(known, seed=4).for_runner_v2())


@pytest.mark.parametrize(("name", "mode"), [("snapkv", "async"), ("bacon+adakv", "sync")])
def test_speculation(model, monkeypatch, name, mode):
    method = METHODS[name]
    draft(monkeypatch, model)
    settings = SETTINGS | {"speculative_config": speculation(mode), "max_num_batched_tokens": 96}
    with scheduling(mode), engine(model, method, **settings) as llm:
        assert isinstance(scheduler_of(llm), AsyncScheduler) == (mode == "async")
        free = free_blocks(llm)
        answers = generate(llm, PROMPTS, PARAMS)
        found = acceptance(llm)
        assert 0 < found.accepted < found.proposed
        assert_same(answers, expected(model, method))
        assert_same(generate(llm, PROMPTS[::-1], PARAMS[::-1]), expected(model, method)[::-1])
        Stepper(llm).flush()
        assert_clean(llm, free)


def test_speculation_while_a_prompt_is_compressed(model, monkeypatch):
    """Drafts are in flight when the order is given; rejected, they do not count in the boundary."""
    method = Method("bacon+adakv", 64, options=(("alpha", 0.0), ("when", "pressure:0.3")))
    settings = SETTINGS | {
        "speculative_config": speculation("async"),
        "num_gpu_blocks_override": 41,
        "enable_prefix_caching": False,
    }
    answers, boundaries = [], []
    with scheduling("async"), engine(model, method, **settings) as llm:
        free, policy = free_blocks(llm), scheduler_of(llm).compression
        for forced in (False, True):
            draft(monkeypatch, model)
            stepper = Stepper(llm)
            stepper.add("a", PROMPTS[0], greedy(40))
            req_id = stepper.internal["a"]
            stepper.run_until(lambda s=stepper: len(s.partial.get("a", ())) >= 8)
            assert req_id not in policy.boundaries
            stepper.add("b", PROMPTS[4], greedy(40))
            stepper.run_until(lambda r=req_id: r in policy.boundaries)
            stepper.step()
            for _ in range(6):
                stepper.step()
            boundaries.append(policy.boundaries[req_id])
            if forced:
                stepper.preempt(stepper.request("a"))
            stepper.run()
            answers.append(stepper.done["a"])
            assert_clean(llm, free)
    assert boundaries[0] == boundaries[1] > len(PROMPTS[0]) + 5
    assert_same([answers[1]], [answers[0]])


def test_storm(model):
    """A small pool, preemptions and aborts at random; the survivors' answers are right."""
    method = METHODS["bacon+adakv"]
    rng = random.Random(3)
    with (
        scheduling("async"),
        engine(
            model, method, max_num_batched_tokens=128, num_gpu_blocks_override=22, **SETTINGS
        ) as llm,
    ):
        free = free_blocks(llm)
        stepper = Stepper(llm)
        added = forced = 0
        while added < 40 or llm.llm_engine.has_unfinished_requests():
            if added < 40 and rng.random() < 0.5:
                stepper.add(str(added), PROMPTS[added % 6], PARAMS[added % 6])
                added += 1
            if stepper.scheduler.running and rng.random() < 0.1:
                stepper.preempt(rng.choice(stepper.scheduler.running))
                forced += 1
            if added % 10 == 9:
                stepper.abort(str(added - 3))
            stepper.step()
        stepper.run()
        assert forced > 5
        assert_clean(llm, free)
        done = [n for n, answer in stepper.done.items() if answer.finish_reason == "length"]
        assert len(done) > 25
        wanted = expected(model, method)
        assert_same([stepper.done[n] for n in done], [wanted[int(n) % 6] for n in done])


def test_layers_that_share_kv():
    """This runner groups the layers itself."""
    model = str(tiny_shared_kv.make("gemma4-e2b", ROOT / ".cache" / "models"))
    method = METHODS["bacon+adakv"]
    with engine(model, method, max_num_batched_tokens=64, **SETTINGS) as llm:
        answers = generate(llm, PROMPTS[1:3], PARAMS[1:3])
    assert_same(answers, expected(model, method)[1:3])


def test_images(docvqa, make_page):
    """M-RoPE and image tokens on this runner."""
    page = make_page(1000)
    method = Method("bacon+adakv", 128, options=(("alpha", 0.0), ("kernel", 9)))
    with engine(docvqa, method, max_num_batched_tokens=200, **SETTINGS) as llm:
        stepper = Stepper(llm)
        stepper.add("page", page_prompt(page), greedy(5))
        stepper.run()
    config = OracleConfig(budget=128, scorer="bacon", allocator="adakv", alpha=0.0, kernel=9)
    ids = stepper.prompts["page"]
    expected = Oracle(docvqa).generate(ids, 5, config, page.image)
    tolerance = measured_tolerance(docvqa, [page_prompt(page)])
    assert_same([stepper.done["page"]], [expected], tolerance)
    assert stepper.done["page"].text.startswith(page.answer)
