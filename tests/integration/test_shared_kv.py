# SPDX-License-Identifier: Apache-2.0
"""Models whose last layers read the KV cache of earlier ones (Gemma 3n, Gemma 4 E2B and E4B).

Only layers with a cache are compressed; the others read the head pages of these.
"""

import functools
from pathlib import Path

import pytest
import tiny_shared_kv
from engine import (
    Answer,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    compressed_layers,
    compressed_manager,
    differ,
    engine,
    free_blocks,
    generate,
    random_prompt,
)
from float_noise import measured_tolerance, text_tolerance
from oracle import Oracle, OracleConfig
from subprocesses import result_of, run_python
from vllm.model_executor.layers.attention.attention import Attention

from vllm_kvcompress.page_state import PageTables

METHODS = [Method("snapkv", 96), Method("bacon+adakv", 96, options=(("alpha", 0.0),))]
STEM = random_prompt(300, seed=81)
PROMPTS = [random_prompt(length, seed=82) for length in (400, 70, 257, 5)]
PROMPTS += [STEM + random_prompt(length, seed=83) for length in (150, 61)]

by_family = pytest.mark.parametrize("family", tiny_shared_kv.FAMILIES)
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def checkpoint(family: str, **settings) -> str:
    cache = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return str(tiny_shared_kv.make(family, cache, **settings))


@functools.cache
def tolerance(family: str) -> float:
    if family == "gemma3n":  # Transformers runs another model
        return text_tolerance()
    return measured_tolerance(checkpoint(family), PROMPTS)


@functools.cache
def expected(method: Method, **settings) -> list:
    """Gemma 4's answers, by the oracle."""
    scorer, _, allocator = method.name.partition("+")
    config = OracleConfig(
        budget=method.budget,
        scorer=scorer,
        allocator=allocator or "uniform",
        **dict(method.options),
    )
    oracle = Oracle(checkpoint("gemma4-e2b", **settings))
    return [oracle.generate(prompt, 8, config) for prompt in PROMPTS]


@by_family
def test_covering_budget_is_stock(family):
    settings = {"max_num_batched_tokens": 200}
    with engine(checkpoint(family), **settings) as llm:
        stock = generate(llm, PROMPTS), generate(llm, PROMPTS)
    with engine(checkpoint(family), Method("bacon+adakv", 2048), **settings) as llm:
        free = free_blocks(llm)
        for answers in stock:
            assert_same(generate(llm, PROMPTS), answers, tolerance(family))
        Stepper(llm).flush()
        assert_clean(llm, free)


@by_family
@by_method
def test_small_budget(family, method):
    """Batched, repeated, alone, in chunks and preempted all the same; and not stock's answers."""
    folder = checkpoint(family)
    with engine(folder, method) as llm:
        free = free_blocks(llm)
        first = generate(llm, PROMPTS)
        repeated = generate(llm, PROMPTS)
        assert_same(repeated, first, tolerance(family))
        assert repeated[0].num_cached_tokens > 0
        assert llm.reset_prefix_cache()
        assert_same([generate(llm, [p])[0] for p in PROMPTS], first, tolerance(family))
        Stepper(llm).flush()
        assert_clean(llm, free)
    with engine(folder, method, max_num_batched_tokens=100) as llm:
        free = free_blocks(llm)
        for steps in (3, 9, 15, 17):
            stepper = Stepper(llm)
            for index, prompt in enumerate(PROMPTS):
                stepper.add(str(index), prompt)
            for _ in range(steps):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            answers = stepper.run()
            assert_same([answers[str(i)] for i in range(len(PROMPTS))], first, tolerance(family))
            assert_clean(llm, free)
    if family == "gemma4-e2b":
        assert_same(first, expected(method), tolerance(family))
    with engine(folder) as llm:
        assert differ(generate(llm, PROMPTS[:1]), first[:1])


def test_readers_have_no_position_of_their_own():
    """Two layers with caches: plans, entries and page tables count these, readers map to them."""
    with engine(checkpoint("gemma4-e2b"), METHODS[1]) as llm:
        facts = compressed_layers(llm).facts
        assert facts.layer_indices == (1, 3)
        positions = {int(name.split(".")[2]): at for name, at in facts.position_of.items()}
        assert positions == {1: 0, 3: 1, 5: 1, 7: 1}
        assert compressed_manager(llm).kv_cache_spec.num_layers == 2


@pytest.mark.parametrize("scorer", ["expected+uniform", "h2o+uniform"])
def test_readers_leave_nothing_behind(scorer):
    """Statistics are those of the layers with a cache, although others use the same modules."""
    method = Method(scorer, 96)
    with engine(checkpoint("gemma4-e2b"), method, max_num_batched_tokens=150) as llm:
        assert_same(generate(llm, PROMPTS), expected(method), tolerance("gemma4-e2b"))


def test_compiled():
    method = METHODS[1]
    with engine(checkpoint("gemma4-e2b"), method, enforce_eager=False) as llm:
        assert_same(generate(llm, PROMPTS), expected(method), tolerance("gemma4-e2b"))


def test_readers_of_earlier_layers(monkeypatch):
    """A reader comes back to page tables that those of later layers have overwritten."""
    original = Attention.__init__

    def init(self, *args, prefix="", **kwargs):
        if ".layers.11." in prefix:  # reads layer 5 as published
            assert ".layers.5." in kwargs["kv_sharing_target_layer_name"]
            kwargs["kv_sharing_target_layer_name"] = prefix.replace(".11.", ".3.")
        original(self, *args, prefix=prefix, **kwargs)

    monkeypatch.setattr(Attention, "__init__", init)
    folder = checkpoint("gemma4-e2b", layers=12)
    with engine(folder, METHODS[1]) as llm:
        answers = generate(llm, PROMPTS)
    monkeypatch.setattr(PageTables, "layers_at_once", lambda self, num_rows: 2)
    with engine(folder, METHODS[1]) as llm:
        assert_same(generate(llm, PROMPTS), answers)


TWO_RANKS = """
import json
from engine import engine, generate
from test_shared_kv import METHODS, PROMPTS, checkpoint
if __name__ == "__main__":
    folder = checkpoint("gemma4-e2b", kv_heads=1)
    with engine(folder, METHODS[0], tensor_parallel_size=2, max_num_seqs=4) as llm:
        print(json.dumps([[a.token_ids, a.logprobs] for a in generate(llm, PROMPTS)]))
"""


def test_one_head_of_the_compressed_layers_on_two_ranks():
    """Both ranks keep the same tokens for the one KV head that full layers of this model have.

    Each scores it with its own query heads; the configuration's KV heads, of which each rank has
    two, are those of sliding layers.
    """
    found = result_of(run_python(TWO_RANKS, timeout=600))
    answers = [Answer(*answer) for answer in found]
    wanted = expected(METHODS[0], kv_heads=1)
    assert_same(answers, wanted, tolerance("gemma4-e2b"))
