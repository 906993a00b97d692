# SPDX-License-Identifier: Apache-2.0
"""Rules that every combination of the oracle's methods obeys, and its view of real models."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import Oracle, OracleConfig, Prompt, kept_sets, merged_entries, select
from oracle.config import ALLOCATORS, SCORERS, budget_of
from PIL import Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from worked import rotate

LAYERS, NUM_Q, NUM_KV, LENGTH, SIZE, BLOCK = 3, 4, 2, 85, 4, 8
SEGMENTS = ((6, 30), (34, 50), (52, 60))
MERGES = ("none", "lookm", "elastic", "recycle")


def project(layer, inputs):
    """Queries of a layer: parts of its inputs, scaled."""
    return inputs.reshape(len(inputs), NUM_Q, SIZE).swapaxes(0, 1) * (layer + 1)


def random_prompt() -> Prompt:
    rng = np.random.default_rng(3)

    def draw(heads):
        return rng.normal(size=(LAYERS, heads, LENGTH, SIZE))

    raw_q, k, v = 2 * draw(NUM_Q), draw(NUM_KV), draw(NUM_KV)
    # heads and layers that attend more and less sharply get unlike budgets
    k[:, 1] *= 3
    raw_q[1] *= 5
    positions = np.arange(LENGTH)[None]
    q, k = (np.stack([rotate(0, layer, positions) for layer in x]) for x in (raw_q, k))
    hidden = rng.normal(size=(LAYERS, LENGTH, NUM_Q * SIZE))
    wo = rng.normal(size=(*q.shape[:2], q.shape[3], 6))
    made = Prompt(q, k, 0.5, v, SEGMENTS, positions, hidden, raw_q, project, rotate)
    grids = [(start, (end - start) // 2, 2) for start, end in SEGMENTS]
    return replace(made, grids=grids, wo=wo)


PROMPT = random_prompt()
HEAD_SCORES = np.random.default_rng(4).random((LAYERS, NUM_Q)) ** 2


def config(scorer, allocator, merge, candidates) -> OracleConfig | None:
    """A configuration with a budget of 40 tokens, or 40 % of the visual ones; None if refused."""
    try:
        return OracleConfig(
            budget="40%" if candidates == "visual" else 40,
            scorer=scorer,
            allocator=allocator,
            merge=merge,
            candidates=candidates,
            window=10,
            block_size=BLOCK,
            proxies=16,
            groups=4,
            horizon=8,
            head_scores=HEAD_SCORES,
            alpha=0.0,
        )
    except ValueError:
        return None


@pytest.mark.parametrize("candidates", ["all", "visual"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_combination(scorer, allocator, candidates):
    for merge in MERGES:
        cfg = config(scorer, allocator, merge, candidates)
        if cfg is None:
            continue
        budget = budget_of(PROMPT.visual, cfg)
        selection = select(PROMPT, cfg)
        plan, full = selection.plan, LENGTH // BLOCK * BLOCK
        assert plan.compressed
        assert np.mean(selection.pages) == plan.uniform
        if allocator in ("uniform", "adakv"):
            assert {np.mean(heads) for heads in selection.pages} == {plan.uniform}
        if allocator not in ("adakv", "sparsemm"):
            assert all(len(set(heads)) == 1 for heads in selection.pages)
        if allocator not in ("pyramid", "sparsemm"):
            floor = math.ceil(plan.fixed / BLOCK) * BLOCK
            least = max(budget.kept - plan.tail, floor)
            assert least <= plan.uniform * BLOCK < max(least, 1) + BLOCK

        entries = merged_entries(PROMPT, selection, cfg)
        always = np.flatnonzero(~budget.candidates)
        for layer, head in itertools.product(range(LAYERS), range(NUM_KV)):
            positions = selection.kept[layer][head]
            bins = selection.bins[layer][head]
            held = np.concatenate([positions[positions < full], *(b.members[-1:] for b in bins)])
            assert (np.diff(positions) > 0).all()
            assert set(always) <= set(positions)
            assert set(range(full, LENGTH)) <= set(positions)
            assert len(set(held)) == len(held) == selection.pages[layer][head] * BLOCK
            if scorer in ("elastic", "prefixkv") and merge != "recycle":
                assert positions.tolist() == selection.kept[layer][0].tolist()
            if merge == "none":
                continue
            slots, keys, values = entries[layer][head]
            assert keys.shape == values.shape == (len(slots), SIZE)
            assert np.isfinite(keys).all()
            assert (slots < full).all()
            assert set(slots) <= set(held)


def test_combinations_that_run():
    """Of all pairs, only the refused ones are left out above."""
    allowed = {
        (scorer, allocator)
        for scorer in SCORERS
        for allocator in ALLOCATORS
        if config(scorer, allocator, "none", "visual")
    }
    refused = {(s, "adakv") for s in ("streaming", "elastic", "prefixkv")}
    refused |= {(s, "sparsemm") for s in ("elastic", "prefixkv")}
    assert allowed == set(itertools.product(SCORERS, ALLOCATORS)) - refused


def test_uneven():
    """The random prompt does give heads and layers unlike budgets."""
    for allocator in ALLOCATORS[1:]:
        pages = select(PROMPT, config("snapkv", allocator, "none", "all")).pages
        assert len({count for heads in pages for count in heads}) > 1, allocator


def test_postvision_keeps_a_tenth():
    """The recent part grows with what a head keeps: 12 of 120 tokens, but only 4 of 40."""
    rng = np.random.default_rng(5)
    q = rng.normal(size=(1, 1, 240, 4))
    k = rng.normal(size=(1, 1, 240, 4))
    # nobody looks back at the last tokens
    k[0, 0, 200:] = -10 * q[0, 0, 200:].mean(axis=0)
    for budget in (120, 40):
        cfg = OracleConfig(budget, scorer="postvision", window=8, block_size=8)
        kept = select(Prompt(q, k, 0.5), cfg).kept[0][0]
        recent = int(np.flatnonzero(np.diff(kept) > 1)[-1])
        assert len(kept) - 1 - recent == budget // 10


def text(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 94, length).tolist()


@pytest.mark.parametrize(("family", "layers"), [("llama", 4), ("gemma3", 6)])
def test_model_inputs(checkpoint, family, layers):
    """Its own projection and RoPE lead from the layers' inputs to the queries of the prefill."""
    prompt = Oracle(checkpoint(family, layers=layers)).prompt(text(100, seed=1))
    assert prompt.num_layers == (2 if family == "gemma3" else 4)
    assert prompt.last_position == 99
    for layer, x in enumerate(prompt.hidden):
        queries = prompt.project(layer, x)
        np.testing.assert_array_equal(queries, prompt.raw_q[layer])
        rotated = prompt.rotate(layer, queries, prompt.positions)
        np.testing.assert_allclose(rotated, prompt.q[layer], rtol=1e-6, atol=1e-6)


def image_prompt(oracle: Oracle) -> tuple[list[int], list[Image.Image]]:
    """Two images, the second larger, with text around them, and 4 + 16 tokens for them."""
    model = oracle.model.config
    start, end, pad = model.vision_start_token_id, model.vision_end_token_id, model.image_token_id
    noise = np.random.default_rng(2).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    images = [Image.fromarray(noise[:size, :size]) for size in (56, 112)]
    ids = text(40, seed=6) + [start] + [pad] * 4 + [end, start] + [pad] * 16 + [end]
    return ids + text(40, seed=7), images


def test_model_with_images(checkpoint):
    oracle = Oracle(checkpoint("qwen2-vl"))
    prompt = oracle.prompt(*image_prompt(oracle))
    assert prompt.segments == [(41, 45), (47, 63)]
    assert prompt.positions.shape == (3, 104)
    # an image advances positions by its longer side
    assert prompt.last_position == 104 - 4 - 16 + 2 + 4 - 1
    for layer, raw in enumerate(prompt.raw_q):
        rotated = prompt.rotate(layer, raw, prompt.positions)
        np.testing.assert_allclose(rotated, prompt.q[layer], rtol=1e-6, atol=1e-6)
        shared = np.full((1, 104), 50)
        spread = np.full((3, 104), 50)
        once, thrice = (prompt.rotate(layer, raw, where) for where in (shared, spread))
        np.testing.assert_array_equal(once, thrice)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_on_a_model(checkpoint, scorer):
    """Decodes from kept sets that follow from the arrays of its prefill alone."""
    oracle = Oracle(checkpoint("qwen2-vl"))
    ids, images = image_prompt(oracle)
    cfg = OracleConfig("50%", scorer=scorer, window=16, block_size=8)
    out = oracle.generate(ids, 2, cfg, images)
    assert np.isfinite(out.logprobs).all()
    prompt = oracle.prompt(ids, images)
    expected = kept_sets(
        prompt.q,
        prompt.k,
        cfg,
        prompt.scale,
        v=prompt.v,
        segments=[(41, 45), (47, 63)],
        positions=prompt.positions,
        hidden=prompt.hidden,
        raw_q=prompt.raw_q,
        project=prompt.project,
        rotate=prompt.rotate,
        grids=prompt.grids,
        wo=prompt.wo,
    )
    for ours, theirs in zip(out.kept, expected, strict=True):
        assert [p.tolist() for p in ours] == [p.tolist() for p in theirs]
        assert all(len(positions) < len(ids) for positions in ours)


@pytest.mark.parametrize("merge", MERGES)
def test_generate(checkpoint, merge):
    """Decoding sees kept tokens and merged entries, and nothing else."""
    oracle = Oracle(checkpoint("qwen2-vl"))
    ids, images = image_prompt(oracle)
    scorer = "elastic" if merge == "elastic" else "h2o"
    cfg = OracleConfig(48, scorer=scorer, merge=merge, window=16, block_size=16)
    out = oracle.generate(ids, 3, cfg, images)
    prompt = oracle.prompt(ids, images)
    selection = oracle.select(prompt, cfg)
    entries = merged_entries(prompt, selection, cfg)

    # one more token on a cache that really lacks the rest
    cache = {}
    for layer in range(prompt.num_layers):
        keys, values = prompt.k[layer].copy(), prompt.v[layer].copy()
        for head, positions in enumerate(selection.kept[layer]):
            visible = positions
            if entries:
                slots, merged_keys, merged_values = entries[layer][head]
                keys[head, slots], values[head, slots] = merged_keys, merged_values
                visible = np.union1d(positions, slots)
            cache[layer, head] = keys[head, visible], values[head, visible]
    held = [len(keys) for keys, _ in cache.values()]
    assert len(set(held)) == 1

    def attend(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        outputs = []
        for head in range(query.shape[1]):
            old = [torch.from_numpy(x) for x in cache[module.layer_idx, head // group]]
            new = [x[0, head // group, -1:] for x in (key, value)]
            keys, values = (torch.cat(pair) for pair in zip(old, new, strict=True))
            weights = (query[0, head] @ keys.T * scaling).softmax(-1)
            outputs.append(weights @ values)
        return torch.stack(outputs, dim=1)[None], None

    ALL_ATTENTION_FUNCTIONS.register(oracle.text_config._attn_implementation, attend)
    with torch.inference_mode():
        logits = oracle.model(
            input_ids=torch.tensor([out.token_ids[:1]]),
            position_ids=torch.full((3, 1, 1), prompt.last_position + 1),
        ).logits[0, -1]
    logp = torch.log_softmax(logits.double(), dim=-1).numpy()
    assert int(logp.argmax()) == out.token_ids[1]
    assert logp.max() == pytest.approx(out.logprobs[1], abs=1e-5)
    whole = oracle_answer(checkpoint, ids, images)
    assert whole.logprobs[0] == pytest.approx(out.logprobs[0], abs=1e-6)
    assert whole.logprobs[1] != pytest.approx(out.logprobs[1], abs=1e-4)


def oracle_answer(checkpoint, ids, images):
    """The uncompressed answer."""
    return Oracle(checkpoint("qwen2-vl")).generate(ids, 2, None, images)
