# SPDX-License-Identifier: Apache-2.0
"""Compression gives blocks back: to the pool, to waiting requests, and all of them at the end."""

import random

import pytest
from engine import (
    BLOCK_SIZE,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    check_pool,
    engine,
    free_blocks,
    generate,
    greedy,
    held_blocks,
    random_prompt,
)

from vllm_kvcompress.config import metrics_dir
from vllm_kvcompress.metrics import totals


@pytest.mark.parametrize(("name", "prefix_cache"), [("snapkv", True), ("bacon+adakv", False)])
def test_blocks_return_after_the_prompt(checkpoint, name, prefix_cache):
    """20 blocks of a prompt become 3, one step after the one that ends it; metrics say so."""
    length = 19 * BLOCK_SIZE + 5
    with engine(
        checkpoint("llama"),
        Method(name, 64),
        max_num_batched_tokens=256,
        enable_prefix_caching=prefix_cache,
    ) as llm:
        before = totals(metrics_dir())
        free = free_blocks(llm)
        stepper = Stepper(llm)
        stepper.add("a", random_prompt(length, seed=1), greedy(4))
        held = []
        while stepper.engine.has_unfinished_requests():
            stepper.step()
            held.append(free - free_blocks(llm))
            check_pool(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool)
        assert stepper.chunks["a"] == [256, 256, length - 512]
        # 64 - 5 tokens in whole blocks, and the tail with the decoded tokens
        assert held == [8, 16, 20, 3, 3, 0]
        stepper.run()
        assert_clean(llm, free)
        gained = {key: value - before[key] for key, value in totals(metrics_dir()).items()}
    assert gained["requests_compressed"] == 1
    assert gained["requests_kept_whole"] == 0
    assert gained["prompt_tokens"] == length
    assert gained["kept_tokens"] == 2 * BLOCK_SIZE + 5
    assert (gained["blocks_before"], gained["blocks_after"]) == (20, 3)
    assert gained["blocks_freed"] == 17
    assert gained["seconds_sum"] > 0


def test_three_times_as_many_requests_run_at_once(checkpoint):
    """A pool that holds three uncompressed prompts runs nine compressed ones or more."""
    model = checkpoint("llama")
    prompts = [random_prompt(600 + index, seed=2) for index in range(12)]
    settings = {"max_num_seqs": 12, "max_num_batched_tokens": 640}
    peak, steps, answers = {}, {}, {}
    for method in (None, Method("bacon", 64)):
        with engine(model, method, num_gpu_blocks_override=66, **settings) as llm:
            stepper = Stepper(llm)
            for index, prompt in enumerate(prompts):
                stepper.add(str(index), prompt, greedy(30))
            stepper.run()
            assert stepper.preemptions == 0
            peak[method], steps[method] = stepper.peak_running, stepper.steps
            answers[method] = [stepper.done[str(index)] for index in range(12)]
    assert peak[None] == 3
    assert peak[method] >= 3 * peak[None]
    assert steps[method] < steps[None] / 2
    with engine(model, method, **settings) as llm:  # a pool with room for all
        assert_same(answers[method], generate(llm, prompts, greedy(30)))


@pytest.mark.parametrize("name", ["snapkv", "bacon+adakv"])
def test_nothing_leaks_after_500_requests(checkpoint, name):
    """Short and long, shared prefixes, aborts, preemptions: all blocks and slots return."""
    rng = random.Random(7)
    stems = [random_prompt(160, seed=stem) for stem in range(4)]
    with engine(
        checkpoint("llama", layers=1),
        Method(name, 64),
        num_gpu_blocks_override=40,
        max_num_seqs=12,
        max_num_batched_tokens=192,
        max_model_len=512,
    ) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        added = aborted = 0
        alive: list[str] = []
        while added < 500 or alive:
            for _ in range(rng.randrange(6) if added < 500 else 0):
                stem = rng.choice(stems)[: rng.choice((0, 0, 64, 160))]
                prompt = stem + random_prompt(rng.randrange(1, 200), seed=added)
                stepper.add(str(added), prompt, greedy(rng.randrange(1, 24)))
                alive.append(str(added))
                added += 1
            if alive and rng.random() < 0.15:
                victim = rng.choice(alive)
                stepper.abort(victim)
                alive.remove(victim)
                aborted += 1
            stepper.step()
            alive = [one for one in alive if one not in stepper.done]
            if stepper.steps % 25 == 0:
                check_pool(stepper.scheduler.kv_cache_manager.block_pool)
        stepper.flush()
        assert added >= 500
        assert aborted > 20
        assert stepper.preemptions > 0
        assert stepper.peak_running > 4
        assert_clean(llm, free)
        held_after = {name: len(tokens) for name, tokens in stepper.partial.items()}
        assert len(held_after) >= added - aborted
        again = generate(llm, [stems[0] + random_prompt(90, seed=1)])
    with engine(checkpoint("llama", layers=1), Method(name, 64), max_model_len=512) as llm:
        assert_same(again, generate(llm, [stems[0] + random_prompt(90, seed=1)]))


def test_a_prompt_that_fits_keeps_its_blocks(checkpoint):
    with engine(checkpoint("llama"), Method("snapkv", 160)) as llm:
        stepper = Stepper(llm)
        stepper.add("whole", random_prompt(150, seed=1))
        stepper.step()
        stepper.step()
        assert held_blocks(stepper, "whole") == 5
        stepper.run()
