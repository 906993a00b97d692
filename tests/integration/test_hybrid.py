# SPDX-License-Identifier: Apache-2.0
"""Models that mix full attention with sliding windows: only the full layers are compressed."""

import functools

import numpy as np
import pytest
from engine import (
    BLOCK_SIZE,
    Method,
    Stepper,
    assert_same,
    cache_stats,
    check_pool,
    compressed_layers,
    differ,
    engine,
    free_blocks,
    generate,
    greedy,
    model_runner,
    random_prompt,
    scheduler_of,
)
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_kvcompress.adapter.kv_cache import CompressedSpec

METHODS = [
    Method("snapkv", 96),
    Method("bacon+adakv", 96, options=(("alpha", 0.0),)),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
FULL_LAYERS = [2, 5]
LENGTHS = (400, 70, 257, 320, 129, 5)
STEM = random_prompt(9 * BLOCK_SIZE, seed=41)
PROMPTS = [random_prompt(length, seed=42) for length in LENGTHS]
PROMPTS += [STEM + random_prompt(length, seed=43) for length in (150, 61)]


@pytest.fixture(scope="module")
def gemma(checkpoint) -> str:
    """Six layers: 2 and 5 attend fully, the others see 64 tokens."""
    return checkpoint("gemma3", layers=6)


@functools.cache
def tolerance(model: str) -> float:
    return measured_tolerance(model, PROMPTS)


@by_method
def test_equals_oracle(gemma, method):
    oracle = Oracle(gemma)
    config = OracleConfig(
        budget=method.budget,
        scorer=method.name.partition("+")[0],
        allocator=method.name.partition("+")[2] or "uniform",
        **dict(method.options),
    )
    with engine(gemma, method, max_num_batched_tokens=100) as llm:
        answers = generate(llm, PROMPTS)
    assert_same(
        answers, [oracle.generate(prompt, 8, config) for prompt in PROMPTS], tolerance(gemma)
    )


def assert_hybrid_clean(llm, free: int) -> None:
    assert free_blocks(llm) == free
    check_pool(scheduler_of(llm).kv_cache_manager.block_pool)
    layers = compressed_layers(llm)
    assert len(layers.slots) == len(layers.waiting.entries) == 0
    assert layers.plans == {}
    for manager in scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers:
        assert not any(manager.req_to_blocks.values())


@pytest.mark.parametrize(("chunk", "prefix_cache"), [(100, True), (2048, False)])
def test_budget_covers_prompt(gemma, chunk, prefix_cache):
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": prefix_cache}
    with engine(gemma, **settings) as llm:
        expected = generate(llm, PROMPTS), generate(llm, PROMPTS[::-1])
    with engine(gemma, Method("bacon+adakv", 2048), **settings) as llm:
        assert_same(generate(llm, PROMPTS), expected[0])
        assert_same(generate(llm, PROMPTS[::-1]), expected[1])


def test_groups(gemma):
    """One group of ours with the two full layers; sliding-window layers keep all that is vLLM's."""
    with engine(gemma) as llm:
        stock = {
            name: type(layer.impl)
            for name, layer in model_runner(llm).compilation_config.static_forward_context.items()
        }
    with engine(gemma, METHODS[0]) as llm:
        specs = [g.kv_cache_spec for g in model_runner(llm).kv_cache_config.kv_cache_groups]
        assert sum(isinstance(spec, CompressedSpec) for spec in specs) == 1
        assert any(isinstance(spec, SlidingWindowSpec) for spec in specs)
        ours = set(compressed_layers(llm).facts.position_of)
        assert sorted(int(name.split(".")[2]) for name in ours) == FULL_LAYERS
        context = model_runner(llm).compilation_config.static_forward_context
        for name, layer in context.items():
            assert (type(layer.impl) is stock[name]) == (name not in ours)


@by_method
def test_real_budget(gemma, method):
    """The same answers whole, chunked, with and without prefix cache; and not those of stock."""
    answers = []
    for chunk, prefix_cache in ((2048, False), (100, False), (100, True)):
        with engine(
            gemma, method, max_num_batched_tokens=chunk, enable_prefix_caching=prefix_cache
        ) as llm:
            free = free_blocks(llm)
            answers.append(generate(llm, PROMPTS))
            answers.append(generate(llm, PROMPTS))
            Stepper(llm).flush()
            assert_hybrid_clean(llm, free)
            queried, hit = cache_stats(llm)
            assert (hit > 0) == prefix_cache, (queried, hit)
    for other in answers[1:]:
        assert_same(other, answers[0])
    with engine(gemma) as llm:
        stock = generate(llm, PROMPTS)
    for prompt, ours, theirs in zip(PROMPTS, answers[0], stock, strict=True):
        whole = len(prompt) // BLOCK_SIZE <= -(-(96 - len(prompt) % BLOCK_SIZE) // BLOCK_SIZE)
        gap = np.abs(np.array(ours.logprobs) - theirs.logprobs).max()
        assert (ours.token_ids == theirs.token_ids and gap < tolerance(gemma)) == whole


@by_method
def test_shared_prefix(gemma, method):
    """Later prompts with the same start hit, although sliding windows keep few blocks."""
    prompts = [STEM + random_prompt(length, seed=44) for length in (150, 201, 90, 170)]
    with engine(gemma, method, enable_prefix_caching=False) as llm:
        expected = [generate(llm, [prompt])[0] for prompt in prompts]
    with engine(gemma, method, max_num_batched_tokens=128) as llm:
        free = free_blocks(llm)
        answers = [generate(llm, [prompt])[0] for prompt in prompts]
        repeated = generate(llm, prompts)
        Stepper(llm).flush()
        assert_hybrid_clean(llm, free)
        queried, hit = cache_stats(llm)
    assert_same(answers, expected)
    assert_same(repeated, expected)
    assert all(answer.num_cached_tokens > 0 for answer in repeated)
    assert answers[-1].num_cached_tokens > 0
    assert 0.2 < hit / queried < 1


@by_method
def test_only_full_layers_give_blocks_back(gemma, method):
    """While it decodes, a request holds its window in sliding groups and its budget in ours."""
    with engine(gemma, method) as llm:
        stepper = Stepper(llm)
        stepper.add("a", PROMPTS[0])
        stepper.step()
        stepper.step()
        stepper.step()
        managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
        for manager in managers:
            blocks = manager.req_to_blocks[stepper.internal["a"]]
            held = sum(not block.is_null for block in blocks)
            if isinstance(manager, SlidingWindowManager):
                assert held == 3  # 64 tokens of the window and what is being written
            else:
                assert held == 3 + 1  # 80 + 16 tokens, decodes beside the tail
        stepper.run()


@by_method
def test_preempted_after_every_step(gemma, method):
    with engine(gemma, method, enable_prefix_caching=False) as llm:
        expected = generate(llm, PROMPTS[:3])
    with engine(gemma, method, max_num_batched_tokens=200) as llm:
        free = free_blocks(llm)
        for steps in range(1, 10):
            stepper = Stepper(llm)
            for index in range(3):
                stepper.add(str(index), PROMPTS[index], greedy(8))
            for _ in range(steps):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            stepper.run()
            assert_same([stepper.done[str(index)] for index in range(3)], expected)
            assert_hybrid_clean(llm, free)


@pytest.mark.parametrize(
    "flag", [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}]
)
def test_text_of_a_model_with_images_attended_in_both_directions(checkpoint, flag):
    """What the refusal advises: without images it is a model like any other."""
    model = checkpoint("gemma3-images", layers=6)
    prompts = PROMPTS[:3]
    with engine(model, **flag) as llm:
        stock = generate(llm, prompts)
    with engine(model, Method("bacon", "100%"), **flag) as llm:
        assert_same(generate(llm, prompts), stock)
    with engine(model, Method("bacon", 96), **flag) as llm:
        assert differ(generate(llm, prompts)[:1], stock[:1])
