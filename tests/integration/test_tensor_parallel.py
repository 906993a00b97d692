# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel ranks, each with half of the KV heads, in processes of their own.

An allocator shares a layer's budget out among the heads of one rank: a rank cannot lend memory to
another. So uneven budgets differ from those of a single rank, as documented; all else is equal.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
from engine import Method, assert_same, differ, engine, generate, greedy, random_prompt
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig, select
from subprocesses import result_of, run_python

PROMPTS = [random_prompt(length, seed=61) for length in (333, 70, 257, 320)]
PROMPTS.append(PROMPTS[0][:256] + random_prompt(50, seed=62))
UNIFORM = Method("bacon", 96, options=(("mode", "rel"),))
UNEVEN = Method("bacon+adakv", 96, options=(("alpha", 0.0),))
SETTINGS = {"max_num_batched_tokens": 100, "max_num_seqs": 4}

CODE = """
import json
from engine import Method, engine, generate
from test_tensor_parallel import PROMPTS, SETTINGS, UNEVEN, UNIFORM
def run(method, **settings):
    with engine({model!r}, method, tensor_parallel_size=2, **(SETTINGS | settings)) as llm:
        waves = [generate(llm, PROMPTS), generate(llm, PROMPTS)]
        llm.reset_prefix_cache()
        waves += [[generate(llm, [prompt])[0] for prompt in PROMPTS]]
        return [[[a.token_ids, a.logprobs, a.num_cached_tokens] for a in w] for w in waves]
if __name__ == "__main__":
    print(json.dumps({calls}))
"""


class Wave(list):
    """Answers of a subprocess."""

    def __init__(self, raw) -> None:
        super().__init__(_Answer(*one) for one in raw)


class _Answer:
    def __init__(self, token_ids, logprobs, num_cached_tokens) -> None:
        self.token_ids = token_ids
        self.logprobs = logprobs
        self.num_cached_tokens = num_cached_tokens


@pytest.fixture(scope="module")
def model(checkpoint) -> str:
    return checkpoint("llama", kv_heads=4, layers=3)


@functools.cache
def tolerance(model: str) -> float:
    return measured_tolerance(model, PROMPTS)


@functools.cache
def two_ranks(model: str, *calls: str) -> list[list[Wave]]:
    done = run_python(CODE.format(model=model, calls=f"[{', '.join(calls)}]"), timeout=600)
    return [[Wave(wave) for wave in waves] for waves in result_of(done)]


@pytest.fixture(scope="module")
def results(model):
    """Per method: the prompts together, again with prefix hits, and one by one."""
    methods = {
        "uniform": "UNIFORM",
        "uneven": "UNEVEN",
        "everything": "Method('bacon+adakv', 2048)",
    }
    return dict(
        zip(methods, two_ranks(model, *(f"run({m})" for m in methods.values())), strict=True)
    )


def test_uniform_equals_one_rank(model, results):
    with engine(model, UNIFORM, **SETTINGS) as llm:
        expected = generate(llm, PROMPTS)
    for wave in results["uniform"]:
        assert_same(wave, expected, tolerance(model))
    assert any(answer.num_cached_tokens > 0 for answer in results["uniform"][1])


def test_ranks_that_share_a_head_agree(checkpoint):
    """One KV head, whose query heads the ranks divide: both keep what a single rank keeps."""
    model, method = checkpoint("llama", kv_heads=1, layers=3), Method("snapkv", 96)
    [waves] = two_ranks(model, "run(Method('snapkv', 96))")
    with engine(model, method, **SETTINGS) as llm:
        expected = generate(llm, PROMPTS)
    for wave in waves:
        assert_same(wave, expected, tolerance(model))


class PerRankOracle(Oracle):
    """Each rank shares out its own heads' budget: selects for either half of the heads."""

    def select(self, prompt, cfg):
        halves = zip(np.split(prompt.q, 2, axis=1), np.split(prompt.k, 2, axis=1), strict=True)
        first, second = (select(replace(prompt, q=q, k=k), cfg) for q, k in halves)
        kept = [a + b for a, b in zip(first.kept, second.kept, strict=True)]
        return first._replace(kept=kept)


def test_uneven_equals_oracle_per_rank(model, results):
    config = OracleConfig(budget=96, scorer="bacon", allocator="adakv", alpha=0.0)
    reference = PerRankOracle(model)
    expected = [reference.generate(prompt, 8, config) for prompt in PROMPTS]
    for wave in results["uneven"]:
        assert_same(wave, expected, tolerance(model))
    one_rank = [Oracle(model).generate(prompt, 8, config) for prompt in PROMPTS]
    assert differ(results["uneven"][0], one_rank), "the ranks' budgets make no difference here"


def test_budget_covers_prompt(model, results):
    with engine(model, **SETTINGS) as llm:
        expected = generate(llm, PROMPTS, greedy())
    for wave in results["everything"]:
        assert_same(wave, expected, tolerance(model))
