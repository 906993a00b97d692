# SPDX-License-Identifier: Apache-2.0
"""Budgets that need all layers first: published numbers, plain loops, properties, odd prompts."""

import json
from fractions import Fraction

import lcg
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import WINDOW, Prompt, batch_of

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import ALLOCATORS, BudgetRequest, Scope
from vllm_kvcompress.allocation.aircache import AirCacheLayers
from vllm_kvcompress.allocation.prefixkv import PrefixKV, shortest_starts
from vllm_kvcompress.allocation.vlcache import VLCache
from vllm_kvcompress.scoring import LayerTrace, Scores
from vllm_kvcompress.scoring.aircache import AirCache

UNREAD = Scores(base=torch.empty(0), final=torch.empty(0))
"""No allocator of a whole model looks at the scores."""

NUM_LAYERS = 3
ALL = [AirCacheLayers(), AirCacheLayers(statistic="skewness"), VLCache(), PrefixKV()]


def request_of(lengths, num_candidates, capacity, num_protected) -> BudgetRequest:
    columns = (lengths, num_candidates, capacity, num_protected)
    return BudgetRequest(*map(torch.tensor, columns))


def kept_tokens(allocator, observed, request) -> torch.Tensor:
    """[N, L] tokens, from what was observed in each layer."""
    return allocator.kept_tokens(torch.stack(list(observed), dim=1), request)[:, :, 0]


def causal_attention(q, k, scale) -> np.ndarray:
    """[Hq, P, P] float64 of q [Hq, P, D] and k [Hkv, P, D]."""
    num_q, length, _ = q.shape
    keys = np.repeat(k, num_q // k.shape[0], axis=0)
    logits = np.einsum("hid,htd->hit", q, keys).astype(np.float64) * scale
    logits[:, ~np.tri(length, dtype=bool)] = -np.inf
    probs = np.exp(logits - logits.max(2, keepdims=True))
    return probs / probs.sum(2, keepdims=True)


def context(group: list[Prompt], **changes):
    """With column sums of each KV head; garbage past a prompt's end."""
    ctx = batch_of(group, **changes)
    num_kv, longest = group[0].k.shape[0], ctx.is_prompt.shape[1]
    sums = torch.full((len(group), num_kv, longest), float("nan"))
    for i, prompt in enumerate(group):
        probs = causal_attention(prompt.q, prompt.k, prompt.k.shape[2] ** -0.5)
        by_group = probs.sum(1).reshape(num_kv, -1, prompt.length).mean(1)
        sums[i, :, : prompt.length] = torch.from_numpy(by_group)
    ctx.key_attention_sum = sums
    return ctx


def model_of(seed, length, images) -> list[Prompt]:
    """The same prompt in every layer of a model; higher layers look more sharply."""
    layers = [Prompt.random(seed + 50 * i, length, images) for i in range(NUM_LAYERS)]
    for i, prompt in enumerate(layers):
        prompt.q *= 0.5 + i
    return layers


def kept_by(allocator, models, request, **changes) -> torch.Tensor:
    """[N, L] tokens for models, which are lists of one prompt per layer."""
    layers = [context(list(group), **changes) for group in zip(*models, strict=True)]
    observed = [allocator.observe(ctx, UNREAD) for ctx in layers]
    return kept_tokens(allocator, observed, request)


def worked_example() -> list:
    contexts = [lcg.layer_context(layer, 3, LayerTrace()) for layer in range(lcg.LAYERS)]
    for ctx in contexts:
        q, k = (x[ctx.layers[0]] for x in lcg.queries_keys_values()[:2])
        sums = causal_attention(q, k, lcg.SCALE).sum(1)
        ctx.key_attention_sum = torch.from_numpy(sums.reshape(2, 2, -1).mean(1)).float()[None]
    return contexts


class TestAirCache:
    REQUEST = request_of([12], [6], [3], [6])

    def test_published_statistics(self):
        observed = [AirCacheLayers().observe(ctx, UNREAD)[0].tolist() for ctx in worked_example()]
        strength, skewness = zip(*observed, strict=True)
        assert strength == pytest.approx(lcg.published(".868151 .924574 .962015"), abs=6e-7)
        assert skewness == pytest.approx(lcg.published(".405115 0 .700901"), abs=2e-6)

    def test_published_skewness(self):
        values = torch.tensor([[1.0, 2, 3, 4, 10, 99], [-1, -2, -3, -4, -10, 99]])
        segment = torch.tensor([[0] * 5 + [-1]] * 2)
        result = kernels.strength_and_skewness(values, segment, torch.tensor([6, 6]))
        assert result[0].tolist() == pytest.approx([20, 1.697056], abs=6e-7)
        assert result[1].tolist() == [-20, 0]

    def test_published_budgets_and_kept_sets(self):
        contexts = worked_example()
        allocator = AirCacheLayers()
        observed = [allocator.observe(ctx, UNREAD) for ctx in contexts]
        kept = kept_tokens(allocator, observed, self.REQUEST)
        assert kept.tolist() == [[9, 8, 10]]
        sets = []
        for ctx, count in zip(contexts, (kept - 6)[0].tolist(), strict=True):
            final = AirCache().score(ctx).final[:, :, 2:8]
            full = torch.full((1, 2), count)
            chosen = kernels.select_tokens(
                final, full, torch.tensor([6]), torch.tensor([6]), max_count=count
            )
            sets.append([{t + 2 for t in row} for row in chosen[0].tolist()])
        assert sets == [
            [{3, 4, 5}, {3, 4, 5}],
            [{3, 6}, {2, 3}],
            [{4, 5, 6, 7}, {2, 5, 6, 7}],
        ]

    @pytest.mark.parametrize(
        ("statistic", "shares"),
        [
            ("both", [1.022147, 0.503446, 1.474407]),
            ("strength", [0.945444, 1.006891, 1.047665]),
            ("skewness", [1.098850, 0, 1.901150]),
        ],
    )
    def test_published_shares(self, statistic, shares):
        """With a budget of a million the tokens spell the shares: r = 1 of 3e6 tokens."""
        allocator = AirCacheLayers(statistic=statistic)
        observed = [allocator.observe(ctx, UNREAD) for ctx in worked_example()]
        kept = kept_tokens(allocator, observed, request_of([0], [3_000_000], [1_000_000], [0]))
        assert (kept[0] / 1e6).tolist() == pytest.approx(shares, abs=3e-6)

    def test_no_skewness_leaves_strength(self):
        observed = [torch.tensor([[s, 0.0]]).double() for s in (1, 2, 3)]
        for statistic in ("both", "skewness", "strength"):
            kept = kept_tokens(
                AirCacheLayers(statistic=statistic), observed, request_of([90], [60], [10], [30])
            )
            assert kept.tolist() == [[35, 40, 45]]

    @pytest.mark.parametrize("images", [[], [(4, 5)], [(4, 6)]], ids=str)
    def test_fewer_than_three_visual_tokens_are_uniform(self, images):
        models = [model_of(1, 40, images), model_of(2, 50, [(3, 30)])]
        request = request_of([40, 50], [30, 27], [11, 9], [10, 23])
        kept = kept_by(AirCacheLayers(), models, request)
        assert kept[0].tolist() == [21] * NUM_LAYERS
        assert len(set(kept[1].tolist())) > 1

    def test_constant_attention_has_no_skewness(self):
        for count in (3, 7, 10, 49):
            values, segment = torch.full((1, count), 1 / 7), torch.zeros(1, count).long()
            moments = kernels.strength_and_skewness(values, segment, torch.tensor([count]))
            [[strength, skewness]] = moments.tolist()
            assert strength == pytest.approx(count / 7)
            assert skewness == 0

    def test_layer_scope_is_handed_on(self):
        models = [model_of(5, 60, [(3, 40)])]
        ctx = context([models[0][1]])
        head, layer = (
            AirCacheLayers(elite_scope=s).observe(ctx, UNREAD) for s in ("head", "layer")
        )
        assert not head.equal(layer)


class TestVLCache:
    REQUEST = request_of([12], [9], [3], [3])

    @pytest.mark.parametrize(
        ("threshold", "sparsity", "tokens"),
        [
            (0.01, ".041667 .095238 .101190", [6, 6, 6]),
            (0.1, ".357143 .434524 .488095", [7, 6, 5]),
        ],
    )
    def test_published_numbers(self, threshold, sparsity, tokens):
        allocator = VLCache(threshold=threshold)
        observed = [allocator.observe(ctx, UNREAD) for ctx in worked_example()]
        gamma = [1 - density.item() for density in observed]
        assert gamma == pytest.approx(lcg.published(sparsity), abs=6e-7)
        assert kept_tokens(allocator, observed, self.REQUEST).tolist() == [tokens]

    def test_published_shares(self):
        """A prompt of 12 million tokens, so that the tokens spell beta * 12."""
        observed = [VLCache().observe(ctx, UNREAD) for ctx in worked_example()]
        million = 10**6
        kept = kept_tokens(
            VLCache(),
            observed,
            request_of([12 * million], [9 * million], [3 * million], [3 * million]),
        )
        beta = (kept[0] / (12 * million)).tolist()
        assert beta == pytest.approx(lcg.published(".520474 .491379 .488147"), abs=6e-7)

    @pytest.mark.parametrize("threshold", [0.0, 0.05, 1.0])
    def test_equals_the_loop(self, threshold):
        group = [model_of(3, 70, [(4, 30)])[0], model_of(4, 33, [(0, 8)])[2]]
        got = VLCache(threshold=threshold).observe(context(group), UNREAD)
        for i, prompt in enumerate(group):
            probs = causal_attention(prompt.q, prompt.k, 8**-0.5)
            rows = range(prompt.length - prompt.facts.num_instruction_tokens(WINDOW), prompt.length)
            zeros = sum(
                float(probs[h, r, t] < threshold * probs[h, r].max())
                for h in range(4)
                for r in rows
                for t in range(r + 1)
            )
            seen = 4 * sum(r + 1 for r in rows)
            assert got[i].item() == pytest.approx(1 - zeros / seen, abs=1e-9)

    def test_bounds_of_one_percent(self):
        observed = [torch.tensor([x]).double() for x in (1.0, 1e-9, 1e-9)]
        kept = kept_tokens(VLCache(), observed, request_of([1000], [968], [368], [32]))
        assert kept.sum() == 1200
        assert kept[0].tolist() == [1000, 100, 100]
        kept = kept_tokens(VLCache(), observed, request_of([1000], [968], [68], [32]))
        assert kept[0].tolist() == [280, 10, 10]


C0 = (0.50, 0.20, 0.10, 0.08, 0.05, 0.04, 0.02, 0.01)
C1 = (0.15, 0.14, 0.13, 0.13, 0.12, 0.12, 0.11, 0.10)


def prefixkv_loop(layers: list[list[Fraction]], total: int) -> tuple[Fraction, list[int]]:
    """Level and tokens by definition, in exact arithmetic: every level that matters is tried."""
    ranked = [sorted(layer, reverse=True) for layer in layers]
    shares = [[sum(r[: i + 1]) / sum(r) for i in range(len(r))] for r in ranked]

    def counts(level):
        return [1 + next(i for i, s in enumerate(layer) if s >= level) for layer in shares]

    levels = sorted({s for layer in shares for s in layer})
    level = max(level for level in levels if sum(counts(level)) <= total)
    result = counts(level)
    while sum(result) < total:
        gains = [
            r[n] / sum(r) if n < len(r) else Fraction(-1)
            for r, n in zip(ranked, result, strict=True)
        ]
        result[gains.index(max(gains))] += 1
    return level, result


@st.composite
def received(draw):
    """Attention per layer and token full of ties, and a total that the search can start from."""
    num_layers, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    row = st.lists(st.integers(1, 6), min_size=length, max_size=length)
    layers = draw(st.lists(row, min_size=num_layers, max_size=num_layers))
    # powers of two as sums make shares exact in floating point, so that ties stay ties
    layers = [[*layer, 64 - sum(layer)] for layer in layers]
    capacity = draw(st.integers(1, length + 1))
    return layers, capacity


class TestPrefixKV:
    @staticmethod
    def tokens(layers, capacity) -> list[int]:
        observed = [torch.tensor([layer], dtype=torch.float32) for layer in layers]
        length = len(layers[0])
        request = request_of([length], [length], [capacity], [0])
        return kept_tokens(PrefixKV(), observed, request)[0].tolist()

    @pytest.mark.parametrize(
        ("total", "level", "expected"),
        [
            (6, "0.55", [2, 4]),
            (7, "0.67", [2, 5]),
            (8, "0.70", [2, 6]),
            (9, "0.79", [3, 6]),
            (10, "0.80", [3, 7]),
            (11, "0.88", [4, 7]),
        ],
    )
    def test_published_numbers(self, total, level, expected):
        shuffled = torch.tensor([[C0[::-1], C1]])  # order in the prompt does not matter
        result = shortest_starts(shuffled, torch.tensor([total]), torch.tensor([8]))
        assert result.tolist() == [expected]
        exact = [[Fraction(str(x)) for x in layer] for layer in (C0, C1)]
        assert prefixkv_loop(exact, total) == (Fraction(level), expected)

    def test_published_fixture(self):
        observed = [PrefixKV().observe(ctx, UNREAD) for ctx in worked_example()]
        kept = kept_tokens(PrefixKV(), observed, request_of([12], [11], [5], [1]))
        assert kept.tolist() == [[6, 6, 6]]
        exact = [[Fraction(x) for x in layer[0].tolist()] for layer in observed]
        level, counts = prefixkv_loop(exact, 18)
        assert float(level) == pytest.approx(0.813638, abs=6e-7)
        assert counts == [6, 6, 6]
        for layer in observed:
            best = layer[0, 1:11].argsort(descending=True)[:4] + 1
            assert {0, 11, *best.tolist()} == {0, 1, 2, 3, 4, 11}

    @given(received())
    def test_equals_the_loop(self, case):
        layers, capacity = case
        exact = [[Fraction(x) for x in layer] for layer in layers]
        expected = prefixkv_loop(exact, capacity * len(layers))[1]
        assert self.tokens(layers, capacity) == expected

    def test_equal_layers_hand_out_from_the_lowest(self):
        assert self.tokens([[4, 2, 1, 1]] * 3, 2) == [2, 2, 2]
        assert self.tokens([[1, 1, 1, 1]] * 2 + [[4, 0, 0, 0]], 2) == [3, 2, 1]

    @pytest.mark.parametrize("capacity", [1, 5])
    def test_layers_without_attention(self, capacity):
        """Nothing is divided by 0, and layers that know more come first."""
        kept = self.tokens([[0.0] * 6, [5.0, 1, 1, 1, 1, 1], [float("nan")] * 6], capacity)
        assert sum(kept) == 3 * capacity
        assert kept[1] == max(kept)

    def test_profile(self, tmp_path):
        path = tmp_path / "profile.json"
        path.write_text("[0.5, 0.25, 0.75]")
        allocator = PrefixKV(profile=str(path))
        observed = [torch.zeros(2, 1)] * 3
        request = request_of([100, 20], [68, 18], [18, 8], [32, 2])
        assert kept_tokens(allocator, observed, request).tolist() == [[50, 75, 25], [10, 15, 5]]
        half = request_of([100], [68], [8], [12])
        assert kept_tokens(allocator, observed, half).tolist() == [[20, 30, 10]]
        allocator.check_model(3, 28)
        with pytest.raises(ValueError, match="has 3 layers, the model has 4"):
            allocator.check_model(4, 28)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"0": 0.5}, "expected a JSON list"),
            ([], "expected a JSON list"),
            ([0.5, "0.5"], "layer 1 needs a number"),
            ([0.5, 1.5], "layer 1 needs a number"),
            ([1, 1.0], "nothing would be kept"),
        ],
    )
    def test_bad_profiles(self, tmp_path, content, message):
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            PrefixKV(profile=str(path))


@st.composite
def demands(draw):
    """A prompt with images, and a budget of tokens among its scored ones."""
    length = draw(st.integers(12, 70))
    start = draw(st.integers(0, length - 2))
    end = draw(st.integers(start + 1, length))
    num_candidates = draw(st.integers(1, length - 1))
    capacity = draw(st.integers(1, num_candidates))
    model = model_of(draw(st.integers(0, 20)), length, [(start, end)])
    return model, (length, num_candidates, capacity, length - num_candidates)


class TestProperties:
    @pytest.mark.parametrize("allocator", ALL, ids=str)
    @given(case=demands())
    def test_total_and_bounds(self, allocator, case):
        model, numbers = case
        length, _, capacity, pinned = numbers
        request = request_of(*([x] for x in numbers))
        kept = kept_by(allocator, [model], request)
        assert kept.dtype == torch.int64
        assert kept.shape == (1, NUM_LAYERS)
        assert kept.sum() == NUM_LAYERS * (capacity + pinned)
        assert kept.min() >= 1
        assert kept.max() <= length
        if isinstance(allocator, AirCacheLayers):
            assert kept.min() > pinned
        assert kept.equal(kept_by(allocator, [model], request))

    @pytest.mark.parametrize("allocator", ALL, ids=str)
    @given(one=demands(), two=demands())
    def test_two_prompts_equal_two_batches_of_one(self, allocator, one, two):
        both = kept_by(allocator, [one[0], two[0]], request_of(*zip(one[1], two[1], strict=True)))
        for i, (model, numbers) in enumerate((one, two)):
            alone = kept_by(allocator, [model], request_of(*([x] for x in numbers)))
            assert both[i].tolist() == alone[0].tolist()

    def test_every_allocator_of_whole_models_is_here(self):
        of_models = {n for n, a in ALLOCATORS.items() if a.scope is Scope.MODEL}
        assert {allocator.name for allocator in ALL} == of_models

    @pytest.mark.parametrize("allocator", ALL, ids=str)
    def test_heads_of_other_ranks_count(self, allocator):
        """A rank whose heads are told another mean observes something else."""
        model = model_of(9, 60, [(3, 40)])
        here = allocator.observe(context([model[0]]), UNREAD)
        ctx = context([model[0]], mean_over_heads=lambda x: x.mean(1) ** 2)
        assert not allocator.observe(ctx, UNREAD).equal(here)


@pytest.mark.parametrize(
    ("allocator", "options"),
    [
        (AirCacheLayers, {"elite": 2}),
        (AirCacheLayers, {"elite_scope": "all"}),
        (AirCacheLayers, {"statistic": "mean"}),
        (VLCache, {"threshold": -0.1}),
        (PrefixKV, {"profile": 3}),
    ],
)
def test_bad_options(allocator, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        allocator(**options)
