# SPDX-License-Identifier: Apache-2.0
"""Compression and vLLM's prefix cache at once: hits stay, and nobody reads a compacted block."""

import pytest
from engine import (
    BLOCK_SIZE,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    cache_stats,
    check_pool,
    differ,
    engine,
    free_blocks,
    generate,
    greedy,
    random_prompt,
    scheduler_of,
)
from float_noise import text_tolerance
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_kvcompress.adapter import kv_cache
from vllm_kvcompress.config import CONFIG_KEY, KVCompressionConfig
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts

METHODS = [
    Method("snapkv", 96),
    Method("bacon+adakv", 96, options=(("alpha", 0.0),)),
    Method("snapkv", "25%"),
]
STEM = random_prompt(10 * BLOCK_SIZE, seed=11)
A = STEM + random_prompt(203, seed=12)
B = STEM + random_prompt(130, seed=13)
SHORTER = STEM[:300]  # ends inside the stem: its own kept blocks lie where A has a shared prefix
FITS = STEM[:90]
LONGER = A + random_prompt(77, seed=14)


@pytest.fixture(scope="module", autouse=True)
def _measure_noise_first():
    """With an engine of its own, which takes vLLM's metrics away from one that is open."""
    text_tolerance()


def plan(method: Method, prompt: list[int]):
    config = KVCompressionConfig.parse(method.additional_config[CONFIG_KEY])
    planner = BlockPlanner(config, BLOCK_SIZE, num_layers=2, num_kv_heads=2)
    return planner.plan(PromptFacts(len(prompt)))


def alone(model: str, method: Method, prompts: list, params=None) -> list:
    """Each prompt by itself, nothing to hit."""
    with engine(model, method, enable_prefix_caching=False) as llm:
        return [generate(llm, [prompt], params)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("method", "chunk"),
    [(METHODS[0], 2048), (METHODS[1], 100), (METHODS[2], 100)],
    ids=["snapkv", "bacon+adakv", "ratio"],
)
def test_hits_while_the_owner_runs(checkpoint, method, chunk):
    """B takes A's prefix while A, already compressed, decodes; then B is compressed itself."""
    model = checkpoint("llama")
    prompts = {"b": B, "shorter": SHORTER, "fits": FITS, "longer": LONGER, "again": A}
    long = greedy(120)
    expected_a = alone(model, method, [A], long)
    expected = alone(model, method, list(prompts.values()))
    with engine(model, method, max_num_batched_tokens=chunk) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        stepper.add("a", A, long)
        stepper.run_until(lambda: len(stepper.partial.get("a", ())) >= 3)
        for name, prompt in prompts.items():
            stepper.add(name, prompt)
            stepper.run_until(lambda name=name: name in stepper.done)
            check_pool(scheduler_of(llm).kv_cache_manager.block_pool)
        assert "a" not in stepper.done, "the owner must still be running for this test to mean much"
        stepper.run()
        answers = [stepper.done[name] for name in prompts]
        assert_same(answers, expected)
        assert_same([stepper.done["a"]], expected_a)
        assert_clean(llm, free)
        owned = plan(method, A).max_hit  # what A left in the cache
        for answer, prompt in zip(answers, prompts.values(), strict=True):
            shared = next(
                (i for i, pair in enumerate(zip(A, prompt, strict=False)) if pair[0] != pair[1]),
                min(len(A), len(prompt)),
            )
            most = min(owned, shared, plan(method, prompt).max_hit, len(prompt) - 1)
            assert answer.num_cached_tokens == most // BLOCK_SIZE * BLOCK_SIZE > 0
        queried, hit = cache_stats(llm)
        assert hit == sum(answer.num_cached_tokens for answer in answers)
        assert 0.3 < hit / queried < 1


@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_hits_in_every_phase_of_the_owner(checkpoint, method):
    """B arrives before every single step of A: waiting, in any chunk, just compressed, decoding."""
    model = checkpoint("llama")
    expected = alone(model, method, [A, B])
    # with company, a prompt proceeds by 64 tokens per step
    with engine(model, method, long_prefill_token_threshold=64) as llm:
        free = free_blocks(llm)
        hits = []
        for steps in range(0, 14):
            assert llm.reset_prefix_cache()
            stepper = Stepper(llm)
            stepper.add("company", random_prompt(20, seed=9), greedy(40))
            stepper.add("a", A)
            for _ in range(steps):
                stepper.step()
            stepper.add("b", B)
            stepper.run()
            assert_same([stepper.done["a"], stepper.done["b"]], expected)
            assert_clean(llm, free)
            hits.append(stepper.done["b"].num_cached_tokens)
    # a step's later requests may hit what its earlier ones write
    assert hits == [64, 128, 192, 256] + [320] * 10


def test_repeated_prompt(checkpoint):
    """The second time, all but the kept blocks and the tail comes from the cache."""
    method = METHODS[0]
    with engine(checkpoint("llama"), method) as llm:
        first, second, third = (generate(llm, [A])[0] for _ in range(3))
        assert_same([second, third], [first, first])
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens == third.num_cached_tokens == plan(method, A).max_hit
        queried, hit = cache_stats(llm)
        assert (queried, hit) == (3 * len(A), 2 * plan(method, A).max_hit)


def test_answers_of_compressed_prompts_are_not_reused(checkpoint):
    """A conversation goes on: its next turn may hit the old prompt, but no compacted block."""
    model, method = checkpoint("llama"), METHODS[1]
    with engine(model, method) as llm:
        first = generate(llm, [A], greedy(100))[0]
        turn = A + first.token_ids + random_prompt(40, seed=15)
        second = generate(llm, [turn])[0]
        assert second.num_cached_tokens == plan(method, A).max_hit
    assert_same([second], alone(model, method, [turn]))


def test_answers_of_whole_prompts_are_reused(checkpoint):
    """Nothing was compacted, so decoded blocks may be hit like in stock vLLM."""
    model, method = checkpoint("llama"), Method("snapkv", 160)
    with engine(model, method) as llm:
        first = generate(llm, [FITS], greedy(100))[0]
        turn = FITS + first.token_ids + random_prompt(200, seed=15)
        second = generate(llm, [turn])[0]
        assert second.num_cached_tokens == (90 + 99) // BLOCK_SIZE * BLOCK_SIZE
    assert_same([second], alone(model, method, [turn]))


def test_evicted_prefixes(checkpoint):
    """A pool so small that hashed blocks of compressed prompts get evicted and overwritten."""
    model, method = checkpoint("llama"), METHODS[1]
    stems = [random_prompt(6 * BLOCK_SIZE, seed=20 + s) for s in range(5)]
    prompts = [stems[i * i % 5] + random_prompt(40 + 7 * i, seed=i) for i in range(25)]
    expected = alone(model, method, prompts)
    with engine(
        model, method, num_gpu_blocks_override=30, max_num_batched_tokens=128, max_model_len=512
    ) as llm:
        free = free_blocks(llm)
        assert_same(generate(llm, prompts), expected)
        stepper = Stepper(llm)
        stepper.flush()
        assert_clean(llm, free)
        assert cache_stats(llm)[1] > 0


def _hash_everything(monkeypatch):
    """Kept blocks go to the prefix cache under the hash of what they held before compaction."""
    monkeypatch.setattr(
        kv_cache.CompressedManager, "cache_blocks", FullAttentionManager.cache_blocks
    )


def _hit_everything(monkeypatch):
    """A request may hit blocks that it will compact into."""
    monkeypatch.setattr(
        kv_cache.CompressedManager,
        "find_longest_cache_hit",
        FullAttentionManager.__dict__["find_longest_cache_hit"],
    )


@pytest.mark.parametrize("mutation", [_hash_everything, _hit_everything])
def test_mutations_are_noticed(checkpoint, monkeypatch, mutation):
    """Without either cap, compacted blocks reach other requests: some answer must change."""
    model, method = checkpoint("llama"), METHODS[0]
    prompts = [A, SHORTER, B, LONGER]
    expected = alone(model, method, prompts)
    mutation(monkeypatch)
    with engine(model, method) as llm:
        try:
            answers = [generate(llm, [prompt])[0] for prompt in prompts]
        except (AssertionError, RuntimeError):
            return  # an invariant inside the engine noticed
    assert differ(answers, expected)
