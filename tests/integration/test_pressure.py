# SPDX-License-Identifier: Apache-2.0
"""``--kv-compression-when pressure``: prompts are compressed when the block pool runs short."""

import functools

import pytest
from engine import (
    Method,
    Stepper,
    assert_clean,
    assert_same,
    compressed_layers,
    compressed_manager,
    engine,
    free_blocks,
    generate,
    greedy,
    random_prompt,
    scheduler_of,
    scheduling,
)

from vllm_kvcompress.adapter.layers import CompressedLayers

PROMPTS = [random_prompt(600 + index, seed=71) for index in range(12)]
DECODE = 60
BLOCKS = 21
"""Of one prompt and its answer."""

SETTINGS = {"max_num_seqs": 12, "max_num_batched_tokens": 640}
by_scheduling = pytest.mark.parametrize("mode", ["sync", "async"])


def pressure(mark: float = 0.8, **options) -> Method:
    options = {"alpha": 0.0, "when": f"pressure:{mark}"} | options
    return Method("bacon+adakv", 64, options=tuple(options.items()))


@pytest.fixture
def compressed(monkeypatch) -> list[str]:
    """Ids of requests that the worker has compressed, in order."""
    found: list[str] = []
    original = CompressedLayers.compress

    def compress(self, orders):
        found.extend(order.req_id for order in orders)
        original(self, orders)

    monkeypatch.setattr(CompressedLayers, "compress", compress)
    return found


@functools.cache
def stock(model: str):
    with engine(model, **SETTINGS) as llm:
        return generate(llm, PROMPTS, greedy(DECODE))


def add_all(llm) -> Stepper:
    stepper = Stepper(llm)
    for index, prompt in enumerate(PROMPTS):
        stepper.add(str(index), prompt, greedy(DECODE))
    return stepper


@by_scheduling
def test_a_roomy_pool_changes_nothing(checkpoint, compressed, mode):
    model = checkpoint("llama")
    with scheduling(mode), engine(model, pressure(), **SETTINGS) as llm:
        free = free_blocks(llm)
        answers = generate(llm, PROMPTS, greedy(DECODE))
        Stepper(llm).flush()
        assert_clean(llm, free)
    assert_same(answers, stock(model))
    assert compressed == []


@by_scheduling
def test_three_times_as_many_as_fit(checkpoint, compressed, capsys, mode):
    """Stock vLLM preempts; we compress, and every answer begins like stock's."""
    model, pool = checkpoint("llama"), len(PROMPTS) * BLOCKS // 3 - 1
    settings = SETTINGS | {"num_gpu_blocks_override": pool, "enable_prefix_caching": False}
    with scheduling(mode), engine(model, **settings) as llm:
        preempting = add_all(llm)
        preempting.run()
    with scheduling(mode), engine(model, pressure(), **settings) as llm:
        free = free_blocks(llm)
        stepper = add_all(llm)
        boundaries: dict[str, int] = {}
        while llm.llm_engine.has_unfinished_requests():
            stepper.step()
            boundaries |= scheduler_of(llm).compression.boundaries
        stepper.run()
        assert_clean(llm, free)
    with capsys.disabled():
        print(f"\npreemptions: stock {preempting.preemptions}, ours {stepper.preemptions}")
        print(f"steps: stock {preempting.steps}, ours {stepper.steps}")
    assert preempting.preemptions > 0
    assert stepper.preemptions == 0
    assert stepper.steps < preempting.steps
    assert set(compressed) == set(boundaries)
    assert len(compressed) == len(boundaries) > 0, "nobody is compressed twice"
    for index, (prompt, expected) in enumerate(zip(PROMPTS, stock(model), strict=True)):
        answer, req_id = stepper.done[str(index)], stepper.internal[str(index)]
        assert len(answer.token_ids) == DECODE
        # tokens up to this one were computed from the whole prompt
        same = boundaries.get(req_id, len(prompt) + DECODE) - len(prompt) + 1
        assert same > 0
        assert answer.token_ids[:same] == expected.token_ids[:same]


@by_scheduling
def test_replays_are_compressed_where_the_first_life_was(checkpoint, compressed, mode):
    """In the middle of its answer a request is compressed; its second life sees the same."""
    answers, places = [], []
    settings = SETTINGS | {"num_gpu_blocks_override": 101, "enable_prefix_caching": False}
    with scheduling(mode), engine(checkpoint("llama"), pressure(0.3), **settings) as llm:
        free = free_blocks(llm)
        for forced in (False, True):
            stepper = Stepper(llm)
            stepper.add("a", PROMPTS[0], greedy(DECODE))
            stepper.run_until(lambda s=stepper: len(s.partial.get("a", ())) == 10)
            assert stepper.internal["a"] not in compressed
            stepper.add("b", PROMPTS[1], greedy(DECODE))
            stepper.run_until(lambda s=stepper: s.internal["a"] in compressed)
            boundary = scheduler_of(llm).compression.boundaries[stepper.internal["a"]]
            for _ in range(7):
                stepper.step()
            if forced:
                stepper.preempt(stepper.request("a"))
                stepper.step()
            stepper.run()
            assert compressed.count(stepper.internal["a"]) == 1 + forced
            assert_clean(llm, free)
            places.append(boundary)
            answers.append(stepper.done["a"])
    assert places[0] == places[1] > len(PROMPTS[0]) + 5
    assert_same([answers[1]], [answers[0]])


@by_scheduling
def test_few_entries_are_enough_for_all(checkpoint, compressed, mode):
    """Workers have room for two prompts; a third makes one of them be compressed."""
    method = pressure(workspace_mib=1)
    method = Method(method.name, 300, 256, method.options)
    with scheduling(mode), engine(checkpoint("llama"), method, **SETTINGS) as llm:
        free, manager = free_blocks(llm), compressed_manager(llm)
        assert compressed_layers(llm).num_entries == manager.free_entries < 4
        stepper = add_all(llm)
        least = manager.free_entries
        while llm.llm_engine.has_unfinished_requests():
            stepper.step()
            least = min(least, manager.free_entries)
        stepper.run()
        assert_clean(llm, free)
    assert least == 0
    assert len(compressed) >= len(PROMPTS) - 4
    assert all(len(stepper.done[str(index)].token_ids) == DECODE for index in range(12))


@by_scheduling
@pytest.mark.parametrize("when", ["always", "pressure:0.01"])
def test_answers_of_one_token_need_no_compression(checkpoint, compressed, mode, when):
    method = Method("snapkv", 64, options=(("when", when),))
    with scheduling(mode), engine(checkpoint("llama"), method, **SETTINGS) as llm:
        free = free_blocks(llm)
        assert_same(
            generate(llm, PROMPTS, greedy(1)),
            [type(a)(a.token_ids[:1], a.logprobs[:1]) for a in stock(checkpoint("llama"))],
        )
        Stepper(llm).flush()
        assert_clean(llm, free)
        assert compressed == []
        generate(llm, PROMPTS[:1], greedy(3))
        assert len(compressed) == 1


def test_the_first_token_comes_before_the_compression(checkpoint, compressed):
    with engine(checkpoint("llama"), Method("snapkv", 64), **SETTINGS) as llm:
        stepper = Stepper(llm)
        stepper.add("a", PROMPTS[0])
        stepper.run_until(lambda: "a" in stepper.partial)
        assert compressed == []
        stepper.step()
        assert compressed == [stepper.internal["a"]]
        stepper.run()
