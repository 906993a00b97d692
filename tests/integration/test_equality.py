# SPDX-License-Identifier: Apache-2.0
"""With a budget that covers the prompt, the engine must be stock vLLM, token for token."""

import functools

import pytest
from engine import (
    Method,
    assert_same,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    page_prompt,
    random_prompt,
)

LENGTHS = (400, 70, 333, 512, 40, 129, 257, 1, 31, 32, 33, 64)
BATCH = [random_prompt(length, seed=1) for length in LENGTHS]
BATCH[6] = BATCH[0][:192] + BATCH[6][:65]  # shares a prefix
# answers of unlike length: prompts start while others decode
PARAMS = [greedy(3 + 5 * (index % 4)) for index in range(len(BATCH))]
EVERYTHING = (
    Method("snapkv", 4096),
    Method("bacon+adakv", "100%"),
)


@functools.cache
def stock(model: str, chunk: int, prefix_cache: bool):
    """Answers of vLLM without our plugin's help, to two waves of the same prompts."""
    with engine(
        model, max_num_batched_tokens=chunk, max_num_seqs=6, enable_prefix_caching=prefix_cache
    ) as llm:
        return generate(llm, BATCH, PARAMS), generate(llm, BATCH[::-1], PARAMS[::-1])


@pytest.mark.parametrize(
    ("method", "chunk", "prefix_cache"),
    [
        (EVERYTHING[0], 64, True),
        (EVERYTHING[0], 100, False),
        (EVERYTHING[0], 2048, True),
        (EVERYTHING[1], 64, False),
        (EVERYTHING[1], 100, True),
        (EVERYTHING[1], 2048, False),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_budget_covers_prompt(checkpoint, method, chunk, prefix_cache):
    model = checkpoint("llama")
    first, second = stock(model, chunk, prefix_cache)
    with engine(
        model,
        method,
        max_num_batched_tokens=chunk,
        max_num_seqs=6,
        enable_prefix_caching=prefix_cache,
    ) as llm:
        free = free_blocks(llm)
        assert_same(generate(llm, BATCH, PARAMS), first)
        again = generate(llm, BATCH[::-1], PARAMS[::-1])
        assert_same(again, second)
        # what stock vLLM takes from its prefix cache, we take too
        assert [a.num_cached_tokens for a in again] == [a.num_cached_tokens for a in second]
        generate(llm, [random_prompt(5, seed=3)])
        assert free_blocks(llm) == free


def test_whole_prompts_beside_compressed_ones(checkpoint):
    """A request that fits its budget is not touched by neighbours that are compressed."""
    model = checkpoint("llama")
    first, _ = stock(model, 100, True)
    short = [index for index, length in enumerate(LENGTHS) if length < 128]
    method = Method("bacon+adakv", 160)
    with engine(model, method, max_num_batched_tokens=100, max_num_seqs=6) as llm:
        answers = generate(llm, BATCH, PARAMS)
    assert_same([answers[i] for i in short], [first[i] for i in short])
    long = [i for i in range(len(BATCH)) if LENGTHS[i] > 300]
    assert all(answers[i] != first[i] for i in long), "nothing was compressed beside them"


@pytest.mark.parametrize("heads", [1, 8], ids=["one-kv-head", "no-groups"])
def test_extreme_head_counts(checkpoint, heads):
    """One KV head for all queries, and one per query."""
    model = checkpoint("llama", kv_heads=heads, layers=2)
    settings = {"max_num_batched_tokens": 100}
    with engine(model, **settings) as llm:
        expected = generate(llm, BATCH, PARAMS)
    with engine(model, Method("snapkv+adakv", 4096), **settings) as llm:
        assert_same(generate(llm, BATCH, PARAMS), expected)


def test_compiled(checkpoint):
    """The compiled model, as `vllm serve` runs it without --enforce-eager."""
    model = checkpoint("llama")
    settings = {"enforce_eager": False, "max_num_batched_tokens": 100, "max_num_seqs": 6}
    with engine(model, **settings) as llm:
        expected = generate(llm, BATCH, PARAMS)
    with engine(model, Method("bacon+adakv", 4096), **settings) as llm:
        assert model_runner(llm).compilation_config.mode.name == "VLLM_COMPILE" or (
            model_runner(llm).compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
        )
        assert_same(generate(llm, BATCH, PARAMS), expected)


def test_images(docvqa, make_page):
    """M-RoPE and image tokens, whole and in chunks."""
    pages = [make_page(seed) for seed in (1000, 1001, 1002)]
    prompts = [page_prompt(page) for page in pages]
    prompts.append({"prompt_token_ids": random_prompt(70, seed=5)})
    for chunk in (128, 2048):
        settings = {"max_num_batched_tokens": chunk, "limit_mm_per_prompt": {"image": 1}}
        with engine(docvqa, **settings) as llm:
            expected = generate(llm, prompts)
        with engine(docvqa, Method("bacon", 2048), **settings) as llm:
            assert_same(generate(llm, prompts), expected)
