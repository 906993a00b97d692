# SPDX-License-Identifier: Apache-2.0
"""Prefix-cache hits and preemption, for every method.

What a method needs of a prompt's rows decides how much of a prompt may come from the cache; rows
and sums of a preempted request start anew. One engine for all methods (see ``every_method``).
"""

import functools
import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from engine import (
    Answer,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    cache_stats,
    check_pool,
    differ,
    engine,
    free_blocks,
    greedy,
    model_runner,
    scheduler_of,
    scheduling,
)
from every_method import (
    BLOCK_SIZE,
    IMAGE,
    LAYERS,
    METHODS,
    OUTPUT_TOKENS,
    WINDOW,
    Request,
    characters,
    checkpoint,
    picture,
    reconfigure,
    serve,
    settings,
    write_head_scores,
)
from expectations import Reference, logprob_tolerance, oracle_config
from oracle import page_plan
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from vllm_kvcompress import page_state
from vllm_kvcompress.adapter.scheduler import CompressionPolicy
from vllm_kvcompress.plan import BlockPlanner

CHUNK = 77
POOL = 18
"""Blocks; room for any one of the prompts, and not for the outputs of four."""


class Case(NamedTuple):
    """A method, and the first of a prompt's rows that it looks at.

    Attributes:
        rows: "window", "instruction", "all", "none", or that many last rows.
    """

    method: str
    rows: str | int
    options: Mapping[str, Any] = MappingProxyType({})


ROWS = {
    "snapkv": "window",
    "bacon": "window",
    "bacon-plus": "window",
    "mixkv": "window",
    "das": "window",
    "streaming": "none",
    "keydiff": "none",
    "h2o": "all",
    "prefixkv": "all",
    "elastic": "all",
    "shiftkv": "all",
    "expected": "all",
    "aircache": "instruction",
    "postvision": "instruction",
}
"""Of every scorer; allocators and merges look at no further ones."""
CASES = {method: Case(method, ROWS[method.split("+")[0]]) for method in METHODS}
CASES["shiftkv-tail"] = Case("shiftkv", 150, {"stat_ctx": 150})


@pytest.fixture(scope="module")
def raw_of(tmp_path_factory):
    """``raw_of(name)``: settings of a case, with head scores for sparsemm."""
    head_scores = write_head_scores(tmp_path_factory.mktemp("scores"))

    def raw(name: str) -> dict[str, Any]:
        extra = {"head_scores": head_scores} if "sparsemm" in name else {}
        return settings(CASES[name].method, **CASES[name].options, **extra)

    return raw


References = Callable[..., Reference]


@pytest.fixture(scope="module")
def reference() -> References:
    """``reference(*requests)``: what the oracle expects of these; one for each set of requests."""
    return functools.cache(lambda *requests: Reference())


@pytest.fixture(scope="module")
def engines():
    """``engines(mode)``: an engine with a small pool; started once per scheduler.

    Its first method looks at attention inputs, whose hooks are set at the start, and has a budget
    that spans layers.
    """
    logprob_tolerance()  # measured by another engine, which takes vLLM's metrics over
    opened = {}

    def get(mode: str):
        if mode not in opened:
            with scheduling(mode):
                context = engine(
                    checkpoint(),
                    Method("shiftkv+pyramid", 80, WINDOW),
                    max_num_batched_tokens=CHUNK,
                    max_num_seqs=4,
                    max_model_len=448,
                    num_gpu_blocks_override=POOL,
                    limit_mm_per_prompt={"image": 1, "video": 0},
                )
                llm = context.__enter__()
            opened[mode] = context
            scheduler = scheduler_of(llm)
            assert isinstance(scheduler, AsyncScheduler) == (mode == "async")
            get.llm[mode] = llm
        return get.llm[mode]

    get.llm = {}
    yield get
    for context in opened.values():
        context.__exit__(None, None, None)


# prefix-cache hits

STEM = characters(10, 41) + IMAGE + characters(60, 42)
SHARED = 10 + 2 + 180 + 60
"""Tokens that both prompts begin with, 191 of them up to the end of the image."""

FIRST = Request(STEM + characters(37, 43), (picture(21, 15, 12),))
SECOND = Request(STEM + characters(70, 44), (picture(21, 15, 12),))


def blocks_to_cache(raw: dict[str, Any], reference: References, request: Request) -> int:
    """Tokens in blocks that a request leaves behind unchanged."""
    prompt = reference(request).oracle.prompt_of(request)
    plan = page_plan(prompt.length, oracle_config(raw), LAYERS, prompt.num_kv, prompt.segments)
    assert plan.compressed
    return (plan.full - plan.uniform) * BLOCK_SIZE


def most_hit(case: Case, raw: dict[str, Any], reference: References, request: Request) -> int:
    """Tokens of a request that may come from the cache."""
    prompt = reference(request).oracle.prompt_of(request)
    rows = {
        "window": WINDOW,
        "instruction": prompt.length - prompt.segments[-1][1],
        "all": prompt.length,
        "none": 0,
    }.get(case.rows, case.rows)
    free_of_rows = (prompt.length - rows) // BLOCK_SIZE * BLOCK_SIZE
    return min(free_of_rows, blocks_to_cache(raw, reference, request))


@pytest.mark.parametrize("name", CASES)
def test_prefix_hits(engines, reference, raw_of, name):
    """While the owner of the prefix decodes, and again when a prompt comes back."""
    llm, case, raw = engines("sync"), CASES[name], raw_of(name)
    reconfigure(llm, raw)
    free, hits_before = free_blocks(llm), cache_stats(llm)[1]
    stepper = Stepper(llm)
    stepper.add("first", FIRST.prompt, greedy(40))
    stepper.run_until(lambda: len(stepper.partial.get("first", ())) >= 2)
    stepper.add("second", SECOND.prompt, greedy(OUTPUT_TOKENS))
    stepper.run_until(lambda: "second" in stepper.done)
    assert "first" not in stepper.done
    check_pool(scheduler_of(llm).kv_cache_manager.block_pool)
    stepper.run()
    repeated = serve(llm, [FIRST])
    assert_clean(llm, free)

    second = stepper.done["second"]
    shared = SHARED // BLOCK_SIZE * BLOCK_SIZE
    left = blocks_to_cache(raw, reference, FIRST)
    hit = min(shared, left, most_hit(case, raw, reference, SECOND))
    assert second.num_cached_tokens == hit
    assert (hit == 0) == (case.rows == "all")
    again = most_hit(case, raw, reference, FIRST)
    assert repeated[0].answer.num_cached_tokens == again
    assert cache_stats(llm)[1] - hits_before == hit + again

    (expected,) = reference(SECOND).expected(raw, [SECOND])
    assert_same([second], [expected.answer], logprob_tolerance())
    reference(FIRST).check(raw, [FIRST], repeated)
    (expected,) = reference(FIRST).expected(raw, [FIRST])
    assert_same([start(stepper.done["first"])], [expected.answer], logprob_tolerance())


def start(answer: Answer) -> Answer:
    """As many tokens of a longer answer as the oracle makes."""
    return Answer(answer.token_ids[:OUTPUT_TOKENS], answer.logprobs[:OUTPUT_TOKENS])


@pytest.mark.parametrize("name", ["postvision", "h2o", "shiftkv", "shiftkv-tail", "expected"])
def test_longer_hits_are_noticed(engines, reference, raw_of, monkeypatch, name):
    """Without the cap for rows that a method looks at, answers or kept sets must change."""
    llm, raw = engines("sync"), raw_of(name)
    original = BlockPlanner.plan

    def plan(self, facts):
        made = original(self, facts)
        return made.__class__(**vars(made) | {"max_hit": made.num_freed_blocks * BLOCK_SIZE})

    reconfigure(llm, raw)
    serve(llm, [FIRST])
    monkeypatch.setattr(BlockPlanner, "plan", plan)
    (served,) = serve(llm, [SECOND])
    assert served.answer.num_cached_tokens > most_hit(CASES[name], raw, reference, SECOND)
    with pytest.raises(AssertionError):
        reference(SECOND).check(raw, [SECOND], [served])


# preemption

OUTPUTS = 90
STORM = (
    Request(characters(20, 51) + IMAGE + characters(40, 51), (picture(31, 12, 9),)),
    Request(characters(163, 52)),
    Request(characters(224, 53)),
    Request(characters(130, 54)),
)


def alone(llm, requests: tuple[Request, ...]) -> list[Answer]:
    """One request at a time, nothing from the cache."""
    answers = []
    for request in requests:
        assert llm.reset_prefix_cache()
        stepper = Stepper(llm)
        stepper.add("a", request.prompt, greedy(OUTPUTS))
        answers.append(stepper.run()["a"])
        assert not stepper.preemptions
    return answers


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("name", CASES)
def test_preemption(engines, reference, raw_of, mode, name):
    """Requests lose their blocks for lack of room, and at any point of prompt and answer."""
    llm, raw, rng = engines(mode), raw_of(name), random.Random(7)
    reconfigure(llm, raw)
    expected = alone(llm, STORM)
    oracle = [one.answer for one in reference(*STORM).expected(raw, STORM)]
    assert_same([start(answer) for answer in expected], oracle, logprob_tolerance())
    assert llm.reset_prefix_cache()
    free = free_blocks(llm)
    stepper = Stepper(llm)
    for index, request in enumerate(STORM):
        stepper.add(str(index), request.prompt, greedy(OUTPUTS))
    forced = 0
    while llm.llm_engine.has_unfinished_requests():
        stepper.step()
        if stepper.scheduler.running and forced < 12 and rng.random() < 0.2:
            stepper.preempt(rng.choice(stepper.scheduler.running))
            forced += 1
    stepper.run()
    assert forced == 12
    assert stepper.preemptions > 0, "the pool was large enough for all"
    assert_clean(llm, free)
    assert_same([stepper.done[str(i)] for i in range(len(STORM))], expected, logprob_tolerance())


def resume(llm, count: int) -> tuple[Answer, list[int]]:
    """Preempt the last request of STORM after ``count`` outputs and resume it.

    Returns:
        Its answer, and how many tokens were computed after each step of its second life.
    """
    assert llm.reset_prefix_cache()
    stepper = Stepper(llm)
    stepper.add("a", STORM[-1].prompt, greedy(OUTPUTS))
    stepper.run_until(lambda: len(stepper.partial.get("a", ())) == count)
    stepper.preempt(stepper.request("a"))
    ends = []
    while llm.llm_engine.has_unfinished_requests():
        stepper.step()
        ends.append(stepper.num_computed("a"))
    return stepper.run()["a"], ends


@pytest.mark.parametrize("name", ["h2o", "snapkv+adakv", "prefixkv+prefixkv"])
def test_resumed_prompts_end_their_step(engines, raw_of, monkeypatch, name):
    """Prompts are compressed between steps, before outputs of a first life are replayed.

    So the step that ends the prompt of a preempted request takes none of its outputs; a scheduler
    that does not end it there gives wrong answers.
    """
    llm, length = engines("sync"), 130
    reconfigure(llm, raw_of(name))
    expected = alone(llm, STORM[-1:])
    answer, ends = resume(llm, 12)
    assert length in ends
    assert ends[ends.index(length) + 1] == length + 12, "the outputs are replayed as one chunk"
    assert_same([answer], expected, logprob_tolerance())
    monkeypatch.setattr(CompressionPolicy, "clip", lambda self, request, start, count: count)
    answer, ends = resume(llm, 12)
    assert length not in ends
    assert differ([answer], expected)


@pytest.mark.parametrize("name", ["snapkv+pyramid", "snapkv+adakv"])
@pytest.mark.parametrize(
    ("most_ids", "sizes_of"),
    [
        (page_state.MOST_IDS, {1: [3], 2: [3], 3: [3], 4: [3]}),
        (1, {1: [3], 2: [2, 1], 3: [1], 4: [1]}),
    ],
    ids=["room for all", "room for one layer of all requests"],
)
def test_one_launch_makes_the_tables_of_many_layers(
    engines, reference, raw_of, monkeypatch, name, most_ids, sizes_of
):
    """Those of all layers, unless there is no room for so many at once."""
    llm, raw, made = engines("sync"), raw_of(name), []
    monkeypatch.setattr(page_state, "MOST_IDS", most_ids)
    reconfigure(llm, raw)
    buffers = model_runner(llm).attn_groups[0][0].get_metadata_builder().tables
    original = buffers.fill

    def fill(*args):
        table, kv_len = original(*args)
        made.append((len(kv_len), kv_len.shape[1] // buffers.num_kv_heads))
        return table, kv_len

    monkeypatch.setattr(buffers, "fill", fill)
    reference(*STORM).check(raw, STORM, serve(llm, STORM))
    rows_of_steps = {rows for _, rows in made}
    assert rows_of_steps >= {1, 2}
    assert set(made) == {(size, rows) for rows in rows_of_steps for size in sizes_of[rows]}
