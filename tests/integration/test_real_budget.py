# SPDX-License-Identifier: Apache-2.0
"""With a real budget, text, log-probabilities and kept tokens equal an independent reference.

The reference (``tests/oracle/``) never moves a token: it runs Transformers on the full cache and
hides what each KV head evicted. So it shares no code and no idea with head pages.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from engine import (
    BLOCK_SIZE,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    held_blocks,
    page_prompt,
    random_prompt,
)
from float_noise import CEILING, measured_tolerance
from head_pages import assert_kept, held_pages
from oracle import Oracle, OracleConfig, page_plan

from vllm_kvcompress import kernels

MIXED = (400, 70, 257, 320, 129)
"""Multiples of the block size and not, one that is kept whole, tails of 1, 6, 16 and 0 tokens."""


@dataclass(frozen=True)
class Case:
    """One engine and the oracle's settings for it."""

    method: str
    budget: int | str = 96
    options: dict[str, Any] = field(default_factory=dict)
    chunk: int = 2048
    lengths: tuple[int, ...] = MIXED
    block_size: int = BLOCK_SIZE
    window: int = 32

    def oracle(self, prompt_len: int) -> OracleConfig:
        scorer, _, allocator = self.method.partition("+")
        budget = self.budget
        if isinstance(budget, str):
            ratio = float(budget.removesuffix("%")) / 100
            budget = max(math.ceil(ratio * prompt_len), self.block_size, self.window + 1)
        return OracleConfig(
            budget=budget,
            scorer=scorer,
            allocator=allocator or "uniform",
            window=self.window,
            block_size=self.block_size,
            **self.options,
        )

    def engine(self, model: str, **settings):
        return engine(
            model,
            Method(self.method, self.budget, self.window, tuple(self.options.items())),
            max_num_batched_tokens=self.chunk,
            block_size=self.block_size,
            **settings,
        )


CASES = {
    "snapkv": Case("snapkv", 64),
    "snapkv-max": Case("snapkv", 96, {"kernel": 7, "pool": "max", "reduction": "max"}, chunk=100),
    "snapkv-no-pooling": Case("snapkv", 96, {"kernel": 1}, chunk=64),
    "snapkv+adakv": Case("snapkv+adakv", 96, {"alpha": 0.0}, chunk=100),
    "bacon-e": Case("bacon", 96, {"mode": "e"}, chunk=100),
    "bacon-el": Case("bacon", 128, {"mode": "el", "local_k": 3}, chunk=64),
    "bacon-elt": Case("bacon", 96, {"mode": "elt", "trace_r": 2}),
    "bacon-rel": Case("bacon", 96, {"mode": "rel", "lambda_c": 0.8}, chunk=100),
    "bacon+adakv-e": Case("bacon+adakv", 96, {"mode": "e"}),
    "bacon+adakv-elt": Case("bacon+adakv", 96, {"alpha": 0.0}, chunk=100),
    "bacon+adakv-rel": Case("bacon+adakv", 150, {"alpha": 0.0, "mode": "rel"}, chunk=130),
    "adakv-official": Case("snapkv+adakv", 128, {"rounding": "official", "normalize": False}),
    "ratio": Case("bacon", "30%", chunk=100),
    "ratio+adakv": Case("bacon+adakv", "25%", {"alpha": 0.0}),
    "blocks-of-64": Case("bacon+adakv", 200, {"alpha": 0.0}, 130, (400, 320, 257), 64),
    "small-window": Case("snapkv", 64, {}, chunk=100, window=8),
    "large-window": Case("bacon+adakv", 160, {"alpha": 0.0}, chunk=64, window=100),
    "budget-is-window-plus-one": Case("snapkv", 33),
}


@functools.cache
def oracle_of(model: str) -> Oracle:
    return Oracle(model)


def check_against_oracle(
    case: Case,
    model: str,
    prompts: list,
    images: list | None = None,
    tolerance: float | None = None,
) -> None:
    """Run the prompts together; compare every one with the oracle, pages included."""
    with case.engine(model) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        for index, prompt in enumerate(prompts):
            stepper.add(str(index), prompt)
        held = {}
        blocks: dict[str, list[int]] = {name: [] for name in stepper.prompts}
        while stepper.engine.has_unfinished_requests():
            stepper.step()
            for name, ids in stepper.prompts.items():
                if stepper.num_computed(name) >= len(ids):
                    blocks[name].append(held_blocks(stepper, name))
                if stepper.num_computed(name) > len(ids) and name not in held:
                    held[name] = held_pages(stepper, name)  # compressed in the prompt's next step
        stepper.run()
        assert_clean(llm, free)

    oracle = oracle_of(model)
    for index, (name, ids) in enumerate(stepper.prompts.items()):
        image = images[index] if images else None
        config = case.oracle(len(ids))
        plan = page_plan(len(ids), config)
        expected = oracle.generate(ids, 8, config, image)
        assert_same([stepper.done[name]], [expected], tolerance)
        _, keys, _ = oracle.capture(ids, image)
        assert_kept(held[name], keys, expected.kept)
        heads = [positions for layer in expected.kept for positions in layer]
        if not plan.compressed:
            assert all(len(positions) == len(ids) for positions in heads)
            continue
        # never below the budget, less than a block above it
        mean = sum(len(positions) for positions in heads) / len(heads)
        assert 0 <= mean - config.budget < case.block_size
        # the blocks are back one step after the prompt; then the tail and decoded tokens need some
        assert blocks[name][0] >= plan.full
        assert blocks[name][1] == plan.uniform + 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_oracle(checkpoint, case):
    check_against_oracle(
        case, checkpoint("llama"), [random_prompt(length, seed=2) for length in case.lengths]
    )


@pytest.mark.parametrize(
    ("window", "last_chunks", "name", "busy"),
    [
        (32, (1, 10, 32), "snapkv", False),
        (32, (1, 10, 32), "bacon+adakv", True),
        (100, (1, 60), "snapkv", True),
        (100, (1, 60), "bacon+adakv", False),
    ],
)
def test_window_straddles_chunks(checkpoint, window, last_chunks, name, busy):
    """The observation window comes from two or more chunks, the last one down to a single token."""
    model = checkpoint("llama")
    case = Case(name, 160, {"alpha": 0.0} if "adakv" in name else {}, 64, window=window)
    width = case.chunk - busy  # a decode row takes one token of every step
    prompts = [random_prompt(5 * width + last, seed=4) for last in last_chunks]
    with case.engine(model, max_num_seqs=2) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        if busy:
            stepper.add("decode", random_prompt(200, seed=4), greedy(200))
            stepper.run_until(lambda: "decode" in stepper.partial)
        for index, prompt in enumerate(prompts):
            stepper.add(str(index), prompt)
            stepper.run_until(lambda index=index: str(index) in stepper.done)
            assert stepper.chunks[str(index)] == [width] * 5 + [last_chunks[index]]
        stepper.run()
        assert_clean(llm, free)
    answers = [stepper.done[str(index)] for index in range(len(prompts))]
    oracle = oracle_of(model)
    assert_same(answers, [oracle.generate(p, 8, case.oracle(len(p))) for p in prompts])


@pytest.fixture(scope="module")
def pages(make_page):
    return [make_page(seed) for seed in (1000, 1001)]


@pytest.fixture(scope="module")
def tolerance_of_pages(docvqa, pages) -> float:
    return measured_tolerance(docvqa, [page_prompt(page) for page in pages])


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("snapkv", 2048),
        ("bacon+adakv", 128),
        ("bacon-plus+uniform", 128),
        ("bacon-plus+adakv", 2048),
    ],
)
def test_images(docvqa, pages, tolerance_of_pages, name, chunk):
    """M-RoPE positions and image tokens: Qwen2-VL on pages, equal to Transformers."""
    prompts, images = [page_prompt(page) for page in pages], [page.image for page in pages]
    case = Case(name, 96, {"alpha": 0.0} if "adakv" in name else {}, chunk)
    check_against_oracle(case, docvqa, prompts, images, tolerance_of_pages)


EDGES = (63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 161, 191, 192, 193)


@pytest.mark.parametrize(
    "case",
    [
        Case("bacon+adakv", 64, {"alpha": 0.0}, 50),
        Case("snapkv+adakv", 96, {"alpha": 0.0}, window=60),
        Case("bacon", 65, {}, 77, window=64),
        Case("snapkv", "50%", {}, 64),
    ],
    ids=["bacon+adakv", "wide-window", "budget-is-window-plus-one", "ratio"],
)
def test_lengths_at_the_edges(checkpoint, case):
    """Prompt lengths around whole blocks, around the budget and around the window."""
    model = checkpoint("llama", layers=2)
    prompts = [random_prompt(length, seed=8) for length in EDGES]
    with case.engine(model) as llm:
        answers = generate(llm, prompts, greedy(3))
    oracle = oracle_of(model)
    assert_same(answers, [oracle.generate(p, 3, case.oracle(len(p))) for p in prompts])


def test_long_prompt(checkpoint):
    """Ninety-four blocks become four."""
    model = checkpoint("llama", layers=2)
    prompt = random_prompt(3001, seed=9)
    case = Case("bacon+adakv", 128, {"alpha": 0.0, "mode": "rel"}, 1000)
    with case.engine(model, max_model_len=4096) as llm:
        answers = generate(llm, [prompt])
    assert_same(answers, [oracle_of(model).generate(prompt, 8, case.oracle(3001))])


@pytest.mark.parametrize("name", ["snapkv", "bacon+adakv"])
def test_compiled(checkpoint, name):
    """The compiled model compresses what the eager one does."""
    model = checkpoint("llama")
    case = Case(name, 96, {"alpha": 0.0} if "adakv" in name else {}, 100)
    prompts = [random_prompt(length, seed=2) for length in MIXED]
    with case.engine(model, enforce_eager=False) as llm:
        answers = generate(llm, prompts)
    oracle = oracle_of(model)
    assert_same(answers, [oracle.generate(p, 8, case.oracle(len(p))) for p in prompts])


def test_two_engines_at_once(checkpoint):
    """Unlike settings, one process, steps in turn: nothing is shared."""
    model = checkpoint("llama", layers=2)
    cases = [Case("snapkv", 64, {}, 100), Case("bacon+adakv", 160, {"alpha": 0.0}, 64, window=48)]
    prompts = [random_prompt(length, seed=10) for length in (400, 257, 333)]
    with cases[0].engine(model) as one, cases[1].engine(model) as other:
        steppers = [Stepper(one), Stepper(other)]
        for stepper in steppers:
            for index, prompt in enumerate(prompts):
                stepper.add(str(index), prompt)
        while any(s.engine.has_unfinished_requests() for s in steppers):
            for stepper in steppers:
                stepper.step()
    oracle = oracle_of(model)
    for stepper, case in zip(steppers, cases, strict=True):
        assert_same(
            [stepper.done[str(index)] for index in range(len(prompts))],
            [oracle.generate(p, 8, case.oracle(len(p))) for p in prompts],
        )


def test_sixteen_bit(docvqa, make_page):
    """bfloat16, the type of real models: a third of the page is enough to read most codes."""
    pages = [make_page(seed) for seed in range(1000, 1012)]
    prompts = [page_prompt(page) for page in pages]
    case = Case("bacon", 128, {"kernel": 9})
    params = greedy(8).clone()
    params.ignore_eos = False
    with case.engine(docvqa, dtype="bfloat16") as llm:
        answers = generate(llm, prompts, params)
    right = sum(a.text == page.answer for a, page in zip(answers, pages, strict=True))
    assert right >= 10


def test_answers_do_not_depend_on_the_batch(checkpoint):
    """Alone, together, chunked or not: every request gets the same answer."""
    model = checkpoint("llama")
    prompts = [random_prompt(length, seed=6) for length in (500, 333, 64, 289, 410, 96)]
    case = Case("bacon+adakv", 96, {"alpha": 0.0})
    with case.engine(model, enable_prefix_caching=False) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts]
        assert_same(generate(llm, prompts), alone)
    chunked = Case("bacon+adakv", 96, {"alpha": 0.0}, chunk=80)
    with chunked.engine(model, max_num_seqs=4) as llm:
        assert_same(generate(llm, prompts), alone)


# the tests above must be able to fail


def _off_by_one(original):
    def select_tokens(*args, **kwargs):
        return (original(*args, **kwargs) - 1).clamp(min=0)

    return select_tokens


def _worst_first(original):
    def select_tokens(scores, *args, **kwargs):
        return original(-scores, *args, **kwargs)

    return select_tokens


def _other_head(original):
    def stage_tokens(prompts, kept, *args, **kwargs):
        return original(prompts, kept.roll(1, dims=1), *args, **kwargs)

    return stage_tokens


@pytest.mark.parametrize(
    ("function", "mutation"),
    [
        ("select_tokens", _off_by_one),
        ("select_tokens", _worst_first),
        ("stage_tokens", _other_head),
    ],
)
def test_mutations_are_noticed(checkpoint, monkeypatch, function, mutation):
    monkeypatch.setattr(kernels, function, mutation(getattr(kernels, function)))
    case = Case("bacon+adakv", 96, {"alpha": 0.0})
    prompts = [random_prompt(length, seed=2) for length in (400, 257)]
    with pytest.raises(AssertionError):
        check_against_oracle(case, checkpoint("llama"), prompts)


class ForgetfulOracle(Oracle):
    """In one head of one layer, the middle one of the kept tokens is missing."""

    place = (0, 0)

    def select(self, prompt, cfg):
        selection, (layer, head) = super().select(prompt, cfg), self.place
        kept = [list(heads) for heads in selection.kept]
        positions = kept[layer][head]
        kept[layer][head] = np.delete(positions, len(positions) // 2)
        return selection._replace(kept=kept)


@pytest.mark.parametrize("case", [Case("snapkv"), Case("bacon+adakv", 96, {"alpha": 0.0})])
def test_no_tolerance_hides_a_token(checkpoint, case):
    """However noisy a machine is: the smallest mistake of a kept set is above the ceiling."""
    prompt, model = random_prompt(400, seed=2), checkpoint("llama")
    right = oracle_of(model).generate(prompt, 8, case.oracle(400))
    wrong = ForgetfulOracle(model)
    for layer, heads in enumerate(right.kept):
        for head in range(len(heads)):
            wrong.place = (layer, head)
            with pytest.raises(AssertionError):
                assert_same([wrong.generate(prompt, 8, case.oracle(400))], [right], CEILING)
