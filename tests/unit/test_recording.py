# SPDX-License-Identifier: Apache-2.0
"""A recorded compression is the same compression, and what is recorded of it is true."""

from dataclasses import replace

import numpy as np
import oracle
import paged_cache
import pytest
import torch
from oracle.attention import by_group, row_means
from oracle.scorers import boundary_calibration, last_row
from oracle.window import window_rows
from paged_cache import LAYERS, NUM_KV_HEADS, SCALE, Cache, finished_prefills, layer_stack
from planners import oracle_config, planner_of

from vllm_kvcompress.page_state import HeadPageState
from vllm_kvcompress.pipeline import CompressionPipeline
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.recording import PromptRecord, RecordingPipeline

FACTS = PromptFacts(203, ((5, 50), (60, 130)))
SETTINGS = {
    "bacon": {},
    "bacon+adakv": {"mode": "rel", "trace_r": 1, "alpha": 0.0},
    "bacon+pyramid": {"mode": "el", "kernel": 7, "pool": "max", "trace_reduce": "head_mean"},
    "snapkv": {"candidates": "visual", "kernel": 3, "reduction": "max"},
    "keydiff": {},
    "vl-cache": {"budget": "30%"},
    "h2o+uniform+lookm": {},
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture(params=SETTINGS, scope="module")
def planner(request) -> BlockPlanner:
    settings = {"method": request.param, "budget": 48, "window": 8, **SETTINGS[request.param]}
    return planner_of(16, **settings)


def cache_of() -> Cache:
    return Cache.random([FACTS], 16, seed=3)


def record(planner: BlockPlanner, workspace_bytes: int) -> tuple[PromptRecord, Cache]:
    """Compress by a recording pipeline made of a plain one."""
    cache = cache_of()
    _, plain = paged_cache.compress(cache_of(), planner, workspace_bytes=workspace_bytes)
    layers = 1 if len(plain.state.page_count) == 1 else LAYERS
    own = HeadPageState(2, layers, NUM_KV_HEADS, torch.device("cpu"))
    pipeline = RecordingPipeline(**vars(plain) | {"state": own})
    chosen = {0: planner.plan(FACTS)}
    made, count = pipeline.record_one(
        finished_prefills(cache, planner, chosen), layer_stack(cache, planner, chosen)
    )
    assert own.page_count.equal(plain.state.page_count)
    assert own.page_start.equal(plain.state.page_start)
    assert count.shape == (1, LAYERS, NUM_KV_HEADS)
    return made, cache


def oracle_prompt(cache: Cache) -> oracle.Prompt:
    (prompt,) = cache.prompts
    return oracle.Prompt(prompt.q, prompt.k, SCALE, v=prompt.v, segments=FACTS.visual)


def test_the_same_compression(planner):
    """Page for page, whether layers are scored together or one by one."""
    plain = cache_of()
    paged_cache.compress(plain, planner)
    together, first = record(planner, 1 << 29)
    assert first.all_pages.equal(plain.all_pages)
    apart, second = record(planner, 1)
    assert second.all_pages.equal(plain.all_pages)
    assert apart.kept.equal(together.kept)
    prompt = slice(FACTS.length)  # behind it is garbage
    assert apart.final[..., prompt].equal(together.final[..., prompt])
    assert (apart.maps is None) == (together.maps is None)
    for one, other in zip(apart.maps or (), together.maps or (), strict=True):
        assert one.equal(other)


def test_kept(planner):
    """What the oracle keeps; nothing behind the prompt."""
    made, cache = record(planner, 1 << 29)
    config = oracle_config(planner)
    expected = oracle.select(oracle_prompt(cache), config).kept
    for layer in range(LAYERS):
        for head in range(NUM_KV_HEADS):
            found = made.kept[layer, head].nonzero().flatten().tolist()
            assert found == list(expected[layer][head])


def test_maps():
    """Window, last row, evidence, coherence and persistence as the oracle computes them."""
    for method in ("bacon", "bacon+adakv", "bacon+pyramid", "snapkv"):
        planner = planner_of(
            16, **{"method": method, "budget": 48, "window": 8, **SETTINGS[method]}
        )
        made, cache = record(planner, 1 << 29)
        prompt, config = oracle_prompt(cache), oracle_config(planner)
        n = prompt.length - config.window
        rows = np.arange(n, prompt.length)
        trace: list[np.ndarray] = []
        for layer in range(LAYERS):
            base, last, _ = window_rows(prompt, layer, config)
            earlier = trace[max(0, layer - config.trace_r) :]
            capacity = planner.plan(FACTS).capacity
            found = boundary_calibration(base, last, earlier, capacity, config)
            coherence = oracle.pool1d(found.evidence, config.local_k, "avg")
            if config.mode == "rel":
                around = oracle.pool1d(base, config.local_k, "avg")
                coherence = coherence * around / (around + base + 1e-8)
            expected = {
                "window": by_group(
                    row_means(prompt, layer, rows)[:, :n], prompt.num_kv, config.reduction
                ),
                "last": by_group(last_row(prompt, layer)[:, :n], prompt.num_kv, config.reduction),
                "evidence": found.evidence,
                "coherence": coherence,
                "persistence": found.persistence,
            }
            for name, values in expected.items():
                seen = getattr(made.maps, name)[layer]
                np.testing.assert_allclose(seen[:, :n], values, err_msg=name, **TOLERANCE)
                assert not seen[:, n:].any()
            left = found.evidence
            if config.trace_reduce == "head_mean":
                left = np.tile(left.mean(axis=0), (prompt.num_kv, 1))
            trace.append(left)
            if method == "bacon":
                np.testing.assert_allclose(made.final[layer][:, :n], found.score, **TOLERANCE)


def test_one_prompt_at_a_time():
    planner = planner_of(16, method="bacon", budget=48, window=8)
    cache = Cache.random([FACTS, replace(FACTS, length=180)], 16, seed=1)
    _, plain = paged_cache.compress(cache, planner)
    assert isinstance(plain, CompressionPipeline)
    chosen = {index: planner.plan(facts) for index, facts in enumerate(cache.facts)}
    with pytest.raises(AssertionError, match="one prompt at a time"):
        RecordingPipeline(**vars(plain)).record_one(
            finished_prefills(cache, planner, chosen), layer_stack(cache, planner, chosen)
        )
