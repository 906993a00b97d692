# SPDX-License-Identifier: Apache-2.0
"""Hybrids of full attention and other layers: Mamba, delta nets, attention in chunks.

Only the full-attention layers are compressed. vLLM makes a block as large as the state of the other
layers, and attention kernels see it as several blocks, in which plans count.
"""

import dataclasses
import functools
from pathlib import Path

import pytest
import tiny_hybrids
from engine import (
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
    greedy,
    held_blocks,
    model_runner,
    random_prompt,
    scheduling,
)
from float_noise import measured_tolerance
from oracle import Oracle, OracleConfig
from test_families import noise, text_of
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_kvcompress.adapter import cpu_worker
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.prompt import PromptFacts

BLOCK_SIZE = 32
POOL_BLOCK = {
    "granite-4h": 5,
    "nemotron-h": 5,
    "qwen3.5": 9,
    "qwen3-next": 9,
    "llama4": 1,
}
"""Blocks of attention kernels in a block of the pool."""
EXACT = ("granite-4h", "nemotron-h", "llama4")
"""Families that vLLM runs in float32 on a CPU, where its delta nets take bfloat16 only."""
METHODS = [Method("snapkv", 64), Method("bacon+adakv", 96, options=(("alpha", 0.0),))]
FULL_LAYERS = [2, 5]
STEM = random_prompt(600, seed=61)
PROMPTS = [random_prompt(length, seed=62) for length in (700, 70, 410, 5)]
PROMPTS += [STEM + random_prompt(length, seed=63) for length in (150, 290, 33)]

by_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


@pytest.fixture(autouse=True)
def _mamba_states_of_chunk_ends_only(monkeypatch):
    """vLLM's CPU kernel has no states from inside a chunk, but its Mamba layers ask for them."""
    original = MambaMixer2.get_kv_cache_spec

    def get_kv_cache_spec(self, vllm_config):
        return dataclasses.replace(
            original(self, vllm_config),
            num_prefill_checkpoint_blocks=0,
            prefill_checkpoint_alignment=None,
        )

    monkeypatch.setattr(MambaMixer2, "get_kv_cache_spec", get_kv_cache_spec)


@functools.cache
def checkpoint(family: str) -> str:
    cache = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return str(tiny_hybrids.make(family, cache, dtype=dtype_of(family)))


def dtype_of(family: str) -> str:
    return "float32" if family in EXACT else "bfloat16"


def open_engine(family: str, method: Method | None = None, **settings):
    if family == "qwen3.5":
        settings = {"limit_mm_per_prompt": {"image": 1, "video": 0}} | settings
    return engine(checkpoint(family), method, dtype=dtype_of(family), **settings)


@functools.cache
def tolerance(family: str) -> float:
    """What answers may differ by: noise against Transformers, or what stock vLLM repeats itself to.

    The first also shows that both read the same model from the files.
    """
    if family in EXACT:
        return measured_tolerance(checkpoint(family), PROMPTS)
    with open_engine(family) as llm:
        first, repeated, alone = three_ways(llm)
    assert_same(repeated, first, float("inf"))
    assert_same(alone, first, float("inf"))
    pairs = [*zip(first, repeated, strict=True), *zip(first, alone, strict=True)]
    return max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True))


def three_ways(llm) -> tuple[list, list, list]:
    """Answers of one batch, the same again from the prefix cache, and one by one without it."""
    first, repeated = generate(llm, PROMPTS), generate(llm, PROMPTS)
    alone = []
    for prompt in PROMPTS:
        assert llm.reset_prefix_cache()
        alone += generate(llm, [prompt])
    return first, repeated, alone


def plan_of(llm, prompt: list[int]):
    return compressed_manager(llm).planner.plan(PromptFacts(len(prompt)))


@pytest.mark.parametrize("family", EXACT)
@by_method
def test_equals_oracle(family, method):
    """In one batch, in chunks, and on hits, which are as long as they may be."""
    scorer, _, allocator = method.name.partition("+")
    config = OracleConfig(
        budget=method.budget,
        scorer=scorer,
        allocator=allocator or "uniform",
        block_size=BLOCK_SIZE,
        pool_block=POOL_BLOCK[family],
        **dict(method.options),
    )
    oracle = Oracle(checkpoint(family))
    expected = [oracle.generate(prompt, 8, config) for prompt in PROMPTS]
    for chunk in (4096, 200):
        with open_engine(family, method, max_num_batched_tokens=chunk) as llm:
            free = free_blocks(llm)
            for answers in three_ways(llm)[: 3 if chunk > 200 else 2]:
                assert_same(answers, expected, tolerance(family))
            repeated = generate(llm, PROMPTS[:1] * 2)
            assert repeated[1].num_cached_tokens == plan_of(llm, PROMPTS[0]).max_hit > 0
            Stepper(llm).flush()
            assert_clean(llm, free)


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-next"])
def test_small_budget_repeats_itself(family):
    """Where no oracle runs: the same in a batch, on hits, and alone; and not what stock answers."""
    with open_engine(family, METHODS[1], max_num_batched_tokens=4096) as llm:
        free = free_blocks(llm)
        first, repeated, alone = three_ways(llm)
        assert repeated[0].num_cached_tokens == plan_of(llm, PROMPTS[0]).max_hit > 0
        Stepper(llm).flush()
        assert_clean(llm, free)
    assert_same(repeated, first, tolerance(family))
    assert_same(alone, first, tolerance(family))
    with open_engine(family, max_num_batched_tokens=4096) as llm:
        assert differ(generate(llm, PROMPTS), first)


@pytest.mark.parametrize("family", tiny_hybrids.FAMILIES)
def test_covering_budget_is_stock(family):
    settings = {"max_num_batched_tokens": 500}
    with open_engine(family, **settings) as llm:
        stock = generate(llm, PROMPTS), generate(llm, PROMPTS)
    with open_engine(family, Method("bacon+adakv", 2048), **settings) as llm:
        free = free_blocks(llm)
        for expected in stock:
            assert_same(generate(llm, PROMPTS), expected, tolerance(family))
        Stepper(llm).flush()
        assert_clean(llm, free)


def test_images():
    """A covering budget is stock; a small one answers the same in a batch and alone."""
    prompts = [
        {
            "prompt": "<|vision_start|><|image_pad|><|vision_end|>" + text_of(prompt),
            "multi_modal_data": {"image": noise(seed, 256, 256)},
        }
        for seed, prompt in enumerate((PROMPTS[1], PROMPTS[2], PROMPTS[3]))
    ]
    with open_engine("qwen3.5") as llm:
        stock = generate(llm, prompts)
        other = {"multi_modal_data": {"image": noise(9, 256, 256)}}
        assert differ(generate(llm, [prompt | other for prompt in prompts]), stock)
    with open_engine("qwen3.5", Method("bacon", "100%")) as llm:
        assert_same(generate(llm, prompts), stock, tolerance("qwen3.5"))
    with open_engine("qwen3.5", Method("snapkv", 64)) as llm:
        free = free_blocks(llm)
        batched = generate(llm, prompts)
        assert llm.reset_prefix_cache()
        assert_same([generate(llm, [p])[0] for p in prompts], batched, tolerance("qwen3.5"))
        assert differ(batched, stock)
        Stepper(llm).flush()
        assert_clean(llm, free)


def test_blocks_of_the_pool():
    """Blocks of 160 tokens that kernels see as five; only full-attention layers give some back."""
    with open_engine("nemotron-h", METHODS[0]) as llm:
        groups = model_runner(llm).kv_cache_config.kv_cache_groups
        (group,) = (g for g in groups if isinstance(g.kv_cache_spec, CompressedSpec))
        assert group.kv_cache_spec.block_size == 5 * BLOCK_SIZE
        assert [int(name.split(".")[2]) for name in group.layer_names] == FULL_LAYERS
        assert all(isinstance(g.kv_cache_spec, MambaSpec) for g in groups if g is not group)
        assert compressed_layers(llm).block_size == BLOCK_SIZE
        stepper = Stepper(llm)
        stepper.add("long", PROMPTS[0])  # 700 tokens: 628 before the kept blocks
        stepper.add("short", PROMPTS[1] * 3)  # 210 tokens: 128 before the kept blocks
        stepper.run_until(lambda: stepper.num_computed("long") == 700)
        assert (held_blocks(stepper, "long"), held_blocks(stepper, "short")) == (5, 2)
        stepper.step()
        assert (held_blocks(stepper, "long"), held_blocks(stepper, "short")) == (2, 2)
        stepper.run()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_preempted_after_every_step(mode):
    """The state is where the blocks are: replayed outputs see what they saw."""
    method = METHODS[1]
    prompts = [PROMPTS[0], PROMPTS[4], PROMPTS[5]]
    with open_engine("nemotron-h", method, enable_prefix_caching=False) as llm:
        expected = generate(llm, prompts)
    with scheduling(mode), open_engine("nemotron-h", method, max_num_batched_tokens=400) as llm:
        free = free_blocks(llm)
        for steps in range(1, 14, 2):
            stepper = Stepper(llm)
            for index, prompt in enumerate(prompts):
                stepper.add(str(index), prompt)
            for _ in range(steps):
                stepper.step()
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            answers = stepper.run()
            same = [answers[str(index)] for index in range(len(prompts))]
            assert_same(same, expected, tolerance("nemotron-h"))
            assert_clean(llm, free)


def test_pressure():
    """In a roomy pool nobody is compressed, in a tight one prompts are."""
    method = Method("snapkv", 64, options=(("when", "pressure:0.5"),))
    with open_engine("nemotron-h") as llm:
        stock = generate(llm, PROMPTS)
    with open_engine("nemotron-h", method) as llm:
        assert_same(generate(llm, PROMPTS), stock, tolerance("nemotron-h"))
    with open_engine("nemotron-h", method, num_gpu_blocks_override=24) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        for index, prompt in enumerate(PROMPTS):
            stepper.add(str(index), prompt, greedy(200))
        compressed = set()
        while stepper.engine.has_unfinished_requests():
            stepper.step()
            tracked = compressed_manager(llm).tracked.items()
            compressed |= {req_id for req_id, request in tracked if request.compressed}
        assert len(compressed) >= 2
        answers = stepper.run()
        for index, expected in enumerate(stock):
            assert answers[str(index)].token_ids[0] == expected.token_ids[0]
        assert_clean(llm, free)


def test_waiting_for_a_state_compresses_nobody():
    """Two prompts with one stem in one step: the second waits for a state, not for blocks."""
    method = Method("snapkv", 64, options=(("when", "pressure:0.99"),))
    with open_engine("nemotron-h", method) as llm:
        stepper = Stepper(llm)
        stepper.add("waits", PROMPTS[0], greedy(30))
        stepper.run_until(lambda: len(stepper.partial.get("waits", ())) >= 2)
        stepper.add("one", STEM + PROMPTS[1])
        stepper.add("two", STEM + PROMPTS[1] + PROMPTS[3])
        stepper.step()
        assert stepper.num_computed("one") > 0
        assert stepper.num_computed("two") == 0
        tracked = compressed_manager(llm).tracked.values()
        assert not any(request.compressed for request in tracked)
        stepper.run()


def test_blocks_are_zeroed_whole(monkeypatch):
    """vLLM's CPU runner would zero kernel blocks under the numbers of blocks: others' tokens."""
    with open_engine("nemotron-h", METHODS[0]) as llm:
        expected = generate(llm, PROMPTS[:1])
    monkeypatch.setattr(cpu_worker, "_zero_whole_blocks", lambda runner, parts: None)
    with open_engine("nemotron-h", METHODS[0]) as llm:
        stepper = Stepper(llm)
        stepper.add("a", PROMPTS[0])
        for name in "bcdefgh":
            stepper.step()
            stepper.add(name, PROMPTS[2])
        answers = stepper.run()
        assert differ([answers["a"]], expected)
