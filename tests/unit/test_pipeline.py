# SPDX-License-Identifier: Apache-2.0
"""The whole chain on a paged cache: what the page tables show must be what the oracle keeps."""

import json

import numpy as np
import oracle
import paged_cache
import pytest
import torch
from paged_cache import (
    HEAD_SIZE,
    LAYERS,
    NUM_KV_HEADS,
    NUM_Q_HEADS,
    SCALE,
    Cache,
    compress,
    layer_stack,
)
from planners import oracle_config, planner_of

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import ALLOCATORS, Allocator, Scope
from vllm_kvcompress.allocation.pyramid import Pyramid
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import SCORERS, Scorer
from vllm_kvcompress.testing.inputs import Prompt, maker_of, output_projections, rotation


def oracle_prompt(prompt: Prompt, facts: PromptFacts) -> oracle.Prompt:
    weight = maker_of([prompt]).weight

    def rotate(layer, vectors, positions):
        turns = np.array([rotation(p, HEAD_SIZE) for p in positions[0]])
        return np.einsum("nde,hne->hnd", turns, vectors)

    return oracle.Prompt(
        prompt.q,
        prompt.k,
        SCALE,
        v=prompt.v,
        segments=facts.visual,
        hidden=prompt.hidden,
        raw_q=prompt.raw,
        project=lambda layer, inputs: np.einsum("nx,xhd->hnd", inputs, weight),
        rotate=rotate,
        grids=[
            (int(first), int((end - first) // width), int(width))
            for first, end, width, _ in facts.grids(len(facts.visual))
            if width
        ],
        wo=output_projections(NUM_Q_HEADS, HEAD_SIZE),
    )


def check(cache: Cache, planner: BlockPlanner, cfg: oracle.OracleConfig | None = None) -> None:
    """Compress, and compare what every virtual sequence shows with the oracle."""
    cfg = cfg or oracle_config(planner)
    before = cache.all_pages.clone()
    state, _ = compress(cache, planner)
    plans = [planner.plan(fact) for fact in cache.facts]
    size, layer_pages = cache.block_size, cache.layer_pages
    may_change = torch.zeros(len(before), dtype=torch.bool)
    may_change[:NUM_KV_HEADS] = True  # the null block takes what nobody reads
    chosen = [
        oracle.select(oracle_prompt(prompt, fact), cfg)
        for prompt, fact in zip(cache.prompts, cache.facts, strict=True)
    ]
    owner: dict[int, tuple] = {}
    for layer in range(LAYERS):
        may_change[layer * layer_pages :][:NUM_KV_HEADS] = True
        lengths = [fact.length for fact in cache.facts]
        tables, kv_lens = cache.tables(state, layer, lengths)
        for i, (prompt, plan, selection) in enumerate(
            zip(cache.prompts, plans, chosen, strict=True)
        ):
            assert plan.compresses == selection.plan.compressed
            for head in range(NUM_KV_HEADS):
                shown = cache.read(tables[i, head], kv_lens[i, head])
                expected = entries(prompt, cache.facts[i], selection, cfg, layer, head)
                assert len(shown) == len(expected)
                if cfg.merge == "none":
                    np.testing.assert_array_equal(shown, expected)
                else:
                    np.testing.assert_allclose(shown, expected, rtol=2e-5, atol=2e-5)
                pages = tables[i, head, : -(-len(shown) // size)].tolist()
                for page in pages:
                    assert owner.setdefault(page, (i, layer, head)) == (i, layer, head)
            kept = cache.block_table[i, plan.num_freed_blocks : plan.num_full_blocks].long()
            if plan.compresses:
                pages = kept[:, None] * NUM_KV_HEADS + torch.arange(NUM_KV_HEADS)
                may_change[layer * layer_pages + pages.flatten()] = True
    assert cache.all_pages[~may_change].equal(before[~may_change])


def entries(prompt, facts, selection, cfg, layer, head) -> np.ndarray:
    """[kv_len, 2, D] as one head should show them: tokens in order, bins, the tail."""
    rows = np.stack([prompt.k[layer, head], prompt.v[layer, head]], axis=1)
    kept = selection.kept[layer][head]
    in_pages = kept < prompt.length - selection.plan.tail
    bins = []
    merged = oracle.merged_entries(oracle_prompt(prompt, facts), selection, cfg)
    if merged:
        rows = rows.astype(np.float64)
        positions, keys, values = merged[layer][head]
        if cfg.merge == "recycle":
            bins = list(np.stack([keys, values], axis=1))
        else:
            rows[positions] = np.stack([keys, values], axis=1)
    return np.array([*rows[kept[in_pages]], *bins, *rows[kept[~in_pages]]]).reshape(
        -1, 2, HEAD_SIZE
    )


def texts(*lengths: int) -> list[PromptFacts]:
    return [PromptFacts(length) for length in lengths]


IMAGES = [
    PromptFacts(150, ((10, 60), (65, 120)), widths=(5, 11)),
    PromptFacts(97, ((0, 80),), widths=(8,)),  # begins with its image
    PromptFacts(131),
    PromptFacts(120, ((30, 120),)),  # ends with one
    PromptFacts(40, ((4, 20),)),
    PromptFacts(203, ((5, 50), (60, 90), (91, 130))),
]
CASES = [
    # block size, window, budget, prompts: odd ones, block ends, and some that fit
    (4, 3, 8, texts(9, 12, 13, 8, 1)),
    (16, 8, 33, texts(100, 47, 48, 64, 63)),
    (32, 32, 64, texts(1000, 97, 65, 95)),
    (16, 20, 24, texts(57, 33, 250)),
    (1, 2, 5, texts(7, 30)),
    (16, 8, 48, IMAGES),
    (8, 8, "30%", IMAGES),
]


@pytest.fixture(scope="module")
def head_scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "heads.json"
    rng = np.random.default_rng(0)
    heads = [(layer, head) for layer in range(LAYERS) for head in range(NUM_Q_HEADS)]
    path.write_text(json.dumps({f"{a}-{b}": [rng.exponential()] for a, b in heads}))
    return str(path)


def serves(scorer: type[Scorer], allocator: type[Allocator]) -> bool:
    if allocator.scope is Scope.LAYER and not scorer.countable:
        return False
    return allocator.per_layer or not scorer.shared_sets


COMBINATIONS = [(s, a) for s in SCORERS for a in ALLOCATORS if serves(SCORERS[s], ALLOCATORS[a])]


@pytest.mark.parametrize(("scorer", "allocator"), COMBINATIONS)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_tables_show_what_the_oracle_keeps(scorer, allocator, case, head_scores):
    block_size, window, budget, facts = CASES[case]
    options = {"head_scores": head_scores} if allocator == "sparsemm" else {}
    planner = planner_of(
        block_size, method=f"{scorer}+{allocator}", window=window, budget=budget, **options
    )
    seed = sum(fact.length for fact in facts)
    check(Cache.random(facts, block_size, seed, extra=2 * block_size), planner)


VARIANTS = [
    {"method": "h2o+uniform", "recent_share": 0.5},
    {"method": "h2o+uniform", "variant": "observed"},
    {"method": "h2o+adakv", "text_prior": True, "recent_share": 0.29},
    {"method": "h2o+pyramid", "text_prior": True, "budget": 20},
    {"method": "h2o+adakv", "text_prior": True, "budget": 20},  # nothing is left for images
    {"method": "snapkv+adakv", "candidates": "visual", "alpha": 0.0},
    {"method": "postvision+adakv", "alpha": 0.0},
    {"method": "bacon+pyramid", "candidates": "visual", "rounding": "official"},
    {"method": "keydiff+adakv", "candidates": "visual", "normalize": False},
    {"method": "streaming+uniform", "sinks": 0},
    {"method": "das+pyramid", "base": "bacon", "candidates": "all"},
    {"method": "mixkv+uniform", "diversity": "flat"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_variants_equal_the_oracle(settings):
    planner = planner_of(16, **{"window": 8, "budget": 48, **settings})
    check(Cache.random(IMAGES, 16, seed=5), planner)


MERGES = [
    {"method": "snapkv+uniform+lookm"},
    {"method": "snapkv+adakv+lookm", "merge_mode": "weighted", "candidates": "visual"},
    {"method": "snapkv+pyramid+lookm", "merge_mode": "avg"},
    {"method": "elastic+uniform+elastic"},
    {"method": "prefixkv+pyramid+elastic"},
    {"method": "das+uniform+recycle"},
    {"method": "snapkv+adakv+recycle", "bins": 3},
    {"method": "h2o+pyramid+recycle", "bins": 2, "text_prior": True},
]


@pytest.mark.parametrize("settings", MERGES, ids=str)
def test_merged_entries_equal_the_oracle(settings):
    planner = planner_of(16, **{"window": 8, "budget": 60, **settings})
    check(Cache.random(IMAGES, 16, seed=6), planner)


class Late(Allocator):
    """Pyramid, but decided once all layers are known."""

    name = "late"
    scope = Scope.MODEL

    def observe(self, ctx, scores):
        assert scores.base.shape == (len(ctx.prompt_lens), NUM_KV_HEADS, len(ctx.positions))
        return torch.tensor(ctx.layers).repeat_interleave(ctx.num_prompts)

    def kept_tokens(self, observed, request):
        assert observed.tolist() == [[0, 1, 2]] * len(request.capacity)
        facts = zip(request.capacity.tolist(), request.num_candidates.tolist(), strict=True)
        tokens = torch.tensor([Pyramid().head_budgets(*fact, LAYERS, 1) for fact in facts])
        return tokens + request.num_protected[:, None, None]


@pytest.mark.parametrize("merge", ["none", "lookm", "recycle"])
@pytest.mark.parametrize("candidates", ["all", "visual"])
def test_allocators_that_wait_for_all_layers(monkeypatch, candidates, merge):
    """Layers that wait are not touched until the last one, then written as one run."""
    monkeypatch.setitem(ALLOCATORS, "late", Late)
    settings = {"window": 8, "budget": 48, "candidates": candidates}
    planner = planner_of(16, method=f"snapkv+late+{merge}", **settings)
    twin = planner_of(16, method=f"snapkv+pyramid+{merge}", **settings)
    check(Cache.random(IMAGES, 16, seed=7), planner, oracle_config(twin))


@pytest.mark.parametrize("allocator", ["uniform", "pyramid", "adakv"])
def test_decoding_appends_to_the_tail(allocator):
    """Tokens written by their logical position follow the kept ones in the virtual sequence."""
    block_size, decoded = 4, 7
    facts = texts(21, 6, 18)
    cache = Cache.random(facts, block_size, seed=1, extra=decoded)
    planner = planner_of(block_size, method=f"snapkv+{allocator}", window=3, budget=8)
    state, _ = compress(cache, planner)
    lengths = [fact.length for fact in facts]
    longer = [length + decoded for length in lengths]
    marks = np.arange(2 * HEAD_SIZE, dtype=np.float32).reshape(2, HEAD_SIZE)
    for layer in range(LAYERS):
        short, short_lens = cache.tables(state, layer, lengths)
        long, long_lens = cache.tables(state, layer, longer)
        assert long_lens.equal(short_lens + decoded)
        for i, head in np.ndindex(len(facts), NUM_KV_HEADS):
            kept = cache.read(short[i, head], short_lens[i, head]).copy()
            for position in range(lengths[i], longer[i]):
                block = int(cache.block_table[i, position // block_size])
                page = cache.pages(layer)[block * NUM_KV_HEADS + head]
                page.view(block_size, 2, HEAD_SIZE)[position % block_size] = torch.from_numpy(
                    marks + position
                )
            shown = cache.read(long[i, head], long_lens[i, head])
            np.testing.assert_array_equal(shown[: len(kept)], kept)
            new = np.stack([marks + p for p in range(lengths[i], longer[i])])
            np.testing.assert_array_equal(shown[len(kept) :], new)


@pytest.mark.parametrize("method", ["bacon+adakv", "shiftkv+pyramid", "das+uniform+recycle"])
def test_together_as_alone(method):
    """A request's outcome does not depend on who else ends its prompt in the step."""
    planner = planner_of(16, method=method, window=8, budget=40)
    together = Cache.random(IMAGES, 16, seed=3)
    lengths = [fact.length for fact in IMAGES]
    state, _ = compress(together, planner)
    for i in range(len(IMAGES)):
        alone = Cache.random(IMAGES, 16, seed=3).only(i)
        its_state, _ = compress(alone, planner)
        for layer in range(LAYERS):
            tables, kv_lens = together.tables(state, layer, lengths)
            own, own_lens = alone.tables(its_state, layer, lengths[i : i + 1])
            assert kv_lens[i].equal(own_lens[0])
            for head in range(NUM_KV_HEADS):
                np.testing.assert_allclose(
                    together.read(tables[i, head], kv_lens[i, head]),
                    alone.read(own[0, head], own_lens[0, head]),
                    rtol=0,
                    atol=1e-6 if "recycle" in method else 0,
                )


@pytest.mark.parametrize(
    "method", ["keydiff+uniform+lookm", "keydiff+pyramid+lookm", "h2o+vlcache+lookm"]
)
def test_every_layer_is_read_and_written_with_its_own_scales(monkeypatch, method):
    facts = texts(150, 130)
    scales = torch.tensor([1.5, 2.5, 3.5])
    used: dict[str, list] = {"read_prompt": [], "as_stored": []}

    def spy(name):
        original = getattr(kernels, name)

        def call(prompts, *args):
            used[name].append((prompts.key_scale.tolist(), prompts.value_scale.tolist()))
            return original(prompts, *args)

        return call

    def with_scales(cache, planner, chosen):
        return layer_stack(cache, planner, chosen)._replace(
            key_scale=scales, value_scale=scales + 8
        )

    for name in used:
        monkeypatch.setattr(kernels, name, spy(name))
    monkeypatch.setattr(paged_cache, "layer_stack", with_scales)
    planner = planner_of(16, method=method, budget=64, window=8)
    compress(Cache.random(facts, 16, seed=1), planner)
    rows = scales.repeat_interleave(len(facts))
    for calls in used.values():
        assert calls
        assert all(call == (rows.tolist(), (rows + 8).tolist()) for call in calls)
