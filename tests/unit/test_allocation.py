# SPDX-License-Identifier: Apache-2.0
"""Allocators and integer apportionment: published examples and properties."""

from fractions import Fraction

import lcg
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation import ALLOCATORS, apportion, pages_from_tokens
from vllm_kvcompress.allocation.adakv import AdaKV
from vllm_kvcompress.allocation.uniform import Uniform
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.scoring import LayerTrace
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.snapkv import SnapKV

SPIKY = [0.40, 0.03, 0.029, 0.028, 0.027, 0.026, 0.025, 0.024, 0.023, 0.022]
FLAT = [0.14, 0.12, 0.035, 0.034, 0.033, 0.032, 0.031, 0.0305, 0.01, 0.01]


def apportion_row(shares, total, low, high) -> list[int]:
    """``apportion`` of one row."""
    row = torch.tensor([[float(share) for share in shares]], dtype=torch.float64)
    bounds = (torch.tensor([value]) for value in (total, low, high))
    return apportion(row, *bounds)[0].tolist()


def allocate_row(allocator, base, capacity) -> list[int]:
    """Allocation of one request from its base scores [Hkv][n]."""
    base = torch.as_tensor(np.asarray(base, dtype=np.float32))[None]
    num_scored = torch.tensor([base.shape[2]])
    return allocator.allocate(base, num_scored, torch.tensor([capacity]))[0].tolist()


def linear_schedule(num_layers, budget, beta, num_scored) -> list[Fraction]:
    """Real-valued pyramid budgets: a line from high to low with the given mean."""
    low = Fraction(budget, beta)
    high = 2 * budget - low
    if high >= num_scored:
        high = Fraction(num_scored)
        low = 2 * budget - high
    return [high - (high - low) * layer / (num_layers - 1) for layer in range(num_layers)]


@st.composite
def apportionments(draw):
    """Shares with small denominators, so that exact ties happen, and a total of any size."""
    count = draw(st.integers(1, 9))
    denominator = draw(st.sampled_from([1, 2, 3, 5, 8, 10, 32]))
    shares = draw(
        st.lists(st.integers(-20 * denominator, 60 * denominator), min_size=count, max_size=count)
    )
    low = draw(st.integers(0, 10))
    high = draw(st.integers(low, 40))
    total = draw(st.integers(0, 45 * count))
    return [Fraction(share, denominator) for share in shares], total, low, high


class TestApportion:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (linear_schedule(4, 8, 20, 96), [16, 11, 5, 0]),
            (linear_schedule(4, 8, 4, 96), [14, 10, 6, 2]),
            (linear_schedule(4, 8, 4, 12), [12, 9, 7, 4]),
        ],
    )
    def test_pyramid_examples(self, schedule, expected):
        assert apportion_row(schedule, 32, 0, 96) == expected

    def test_pyramid_of_a_real_model(self):
        layers = apportion_row(linear_schedule(28, 32, 20, 10_000), 896, 0, 10_000)
        assert sum(layers) == 896
        assert layers[:5] == [62, 60, 58, 56, 53]
        assert layers[-3:] == [6, 4, 2]

    def test_head_budget_examples(self):
        shares = [0.1 * 36 + 1, 0.5 * 36 + 1, 0.1 * 36 + 1, 0.3 * 36 + 1]
        assert apportion_row(shares, 40, 0, 100) == [5, 19, 4, 12]
        assert apportion_row(shares, 40, 0, 12) == [8, 12, 8, 12]

    def test_other_published_examples(self):
        assert apportion_row([3.066, 1.510, 4.423], 9, 1, 6) == [3, 2, 4]
        assert apportion_row([6.25, 5.90, 5.86], 18, 1, 12) == [6, 6, 6]

    def test_surplus_is_taken_from_the_smallest_fraction(self):
        assert apportion_row([3.2, 3.1, 3.9], 8, 0, 5) == [3, 2, 3]

    def test_everything_full(self):
        assert apportion_row([0, 0], 6, 0, 3) == [3, 3]
        assert apportion_row([5, 5], 2, 1, 9) == [1, 1]

    @given(apportionments())
    def test_equals_the_loop(self, case):
        shares, total, low, high = case
        assert apportion_row(shares, total, low, high) == oracle.apportion(shares, total, low, high)

    @given(apportionments())
    def test_total_and_bounds(self, case):
        shares, total, low, high = case
        result = apportion_row(shares, total, low, high)
        assert all(low <= value <= high for value in result)
        assert sum(result) == min(max(total, low * len(shares)), high * len(shares))
        assert result == apportion_row(shares, total, low, high)

    @given(apportionments(), apportionments())
    def test_rows_are_independent(self, one, two):
        count = min(len(one[0]), len(two[0]))
        rows = [(case[0][:count], *case[1:]) for case in (one, two)]
        shares = torch.tensor([[float(x) for x in row[0]] for row in rows], dtype=torch.float64)
        bounds = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 3))
        assert apportion(shares, *bounds).tolist() == [apportion_row(*row) for row in rows]


class TestAdaKVExamples:
    @pytest.mark.parametrize(
        ("normalize", "alpha", "counts", "official", "exact"),
        [
            (False, 0.0, [2, 8], [2, 8], [2, 8]),
            (False, 0.2, [2, 8], [3, 7], [3, 7]),
            (False, 0.5, [2, 8], [3, 6], [4, 6]),
            (True, 0.0, [3, 7], [3, 7], [3, 7]),
            (True, 0.2, [3, 7], [3, 7], [3, 7]),
            (True, 0.5, [3, 7], [4, 6], [4, 6]),
        ],
    )
    def test_two_heads(self, normalize, alpha, counts, official, exact):
        base = [SPIKY, FLAT]
        allocator = AdaKV(alpha=alpha, normalize=normalize)
        assert allocator.counts(torch.tensor([base]), torch.tensor([5]))[0].tolist() == counts
        assert allocate_row(allocator, base, 5) == exact
        rounded = AdaKV(alpha=alpha, normalize=normalize, rounding="official")
        assert allocate_row(rounded, base, 5) == official

    def test_second_layer_of_the_worked_example(self):
        """Budgets are counted on the window score, also when bacon ranks."""
        trace = LayerTrace()
        contexts = [lcg.layer_context(layer, 4, trace) for layer in (0, 1)]
        bacon = [Bacon().score(ctx) for ctx in contexts][1]
        window = SnapKV().score(contexts[1])
        assert bacon.base.equal(window.base)
        num_scored, capacity = torch.tensor([lcg.NUM_SCORED]), torch.tensor([4])
        allocator = AdaKV(alpha=0.5)
        assert allocator.counts(bacon.base, capacity).tolist() == [[3, 5]]
        assert allocator.allocate(bacon.base, num_scored, capacity).tolist() == [[4, 4]]


@st.composite
def score_rows(draw):
    """Base scores [Hkv][n] full of ties, and a capacity <= n."""
    num_heads = draw(st.integers(1, 5))
    length = draw(st.integers(1, 24))
    row = st.lists(st.integers(0, 12), min_size=length, max_size=length)
    scores = draw(st.lists(row, min_size=num_heads, max_size=num_heads))
    return [[value / 16 for value in row] for row in scores], draw(st.integers(1, length))


class TestAdaKVProperties:
    @given(score_rows(), st.sampled_from([0.0, 0.2, 0.25, 0.5, 1.0]))
    def test_equals_the_oracle(self, case, alpha):
        base, capacity = case
        for rounding in ("exact", "official"):
            cfg = oracle.OracleConfig(
                budget=32 + capacity, alpha=alpha, normalize=False, rounding=rounding
            )
            allocator = AdaKV(alpha=alpha, normalize=False, rounding=rounding)
            expected = oracle.adakv_capacities(np.array(base), cfg)
            assert allocate_row(allocator, base, capacity) == expected

    @pytest.mark.parametrize("seed", range(8))
    def test_normalized_equals_the_oracle(self, seed):
        rng = np.random.default_rng(seed)
        base = rng.gamma(0.3, size=(4, 90)).astype(np.float32)
        cfg = oracle.OracleConfig(budget=32 + 17)
        assert allocate_row(AdaKV(), base, 17) == oracle.adakv_capacities(base, cfg)

    @given(score_rows(), st.booleans(), st.floats(0, 1))
    def test_total_and_bounds(self, case, normalize, alpha):
        base, capacity = case
        allocator = AdaKV(alpha=alpha, normalize=normalize)
        counts = allocator.counts(torch.tensor([base]), torch.tensor([capacity]))
        assert counts.sum() == len(base) * capacity
        result = allocate_row(allocator, base, capacity)
        assert sum(result) == len(base) * capacity
        assert all(0 <= value <= len(base[0]) for value in result)
        assert result == allocate_row(allocator, base, capacity)

    @given(score_rows(), score_rows(), st.booleans())
    def test_rows_are_independent(self, one, two, normalize):
        heads = min(len(one[0]), len(two[0]))
        rows = [(base[:heads], capacity) for base, capacity in (one, two)]
        longest = max(len(base[0]) for base, _ in rows)
        padded = torch.full((2, heads, longest), float("-inf"))
        for i, (base, _) in enumerate(rows):
            padded[i, :, : len(base[0])] = torch.tensor(base)
        allocator = AdaKV(normalize=normalize)
        result = allocator.allocate(
            padded,
            torch.tensor([len(base[0]) for base, _ in rows]),
            torch.tensor([capacity for _, capacity in rows]),
        )
        assert result.tolist() == [allocate_row(allocator, *row) for row in rows]

    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("bad", [0.0, float("nan")])
    def test_a_head_that_looks_nowhere_gets_the_floor(self, normalize, bad):
        """All-zero or NaN scores must not win over real ones."""
        base = [SPIKY, [bad] * 10, FLAT]
        result = allocate_row(AdaKV(alpha=0.2, normalize=normalize), base, 5)
        assert result[1] == 1
        assert sum(result) == 15

    def test_one_head_keeps_the_nominal_budget(self):
        assert allocate_row(AdaKV(), [SPIKY], 7) == [7]


@st.composite
def page_cases(draw):
    """Scored tokens per head that an allocator could give, with the prompt's plan."""
    block_size = draw(st.sampled_from([4, 16, 32]))
    window = draw(st.integers(1, 40))
    budget = draw(st.integers(max(window + 1, block_size), window + 90))
    prompt_len = draw(st.integers(budget + block_size, budget + 200))
    plan = BlockPlanner(block_size, window, budget).plan(prompt_len)
    heads = draw(st.integers(1, 6))
    high = prompt_len - window
    tokens = draw(st.lists(st.integers(0, high), min_size=heads, max_size=heads))
    return tokens, window, plan, block_size


def pages_row(case) -> list[int]:
    tokens, window, plan, block_size = case
    facts = (plan.tail, plan.num_kept_blocks, plan.num_full_blocks)
    tail, kept, full = (torch.tensor([value]) for value in facts)
    return pages_from_tokens(torch.tensor([tokens]), window, tail, kept, full, block_size)[
        0
    ].tolist()


class TestPages:
    @given(page_cases())
    def test_layer_keeps_its_pages(self, case):
        tokens, window, plan, block_size = case
        pages = pages_row(case)
        assert sum(pages) == plan.num_kept_blocks * len(tokens)
        least = -(-max(0, window - plan.tail) // block_size)
        assert all(least <= count <= plan.num_full_blocks for count in pages)

    @given(page_cases())
    def test_equals_the_loop(self, case):
        tokens, window, plan, block_size = case
        shares = [Fraction(count + window - plan.tail, block_size) for count in tokens]
        least = -(-max(0, window - plan.tail) // block_size)
        total = plan.num_kept_blocks * len(tokens)
        expected = oracle.apportion(shares, total, least, plan.num_full_blocks)
        assert pages_row(case) == expected

    @given(page_cases(), page_cases())
    def test_rows_are_independent(self, one, two):
        heads = min(len(one[0]), len(two[0]))
        window, block_size = one[1], one[3]
        plans = [
            BlockPlanner(block_size, window, max(window + 1, block_size)).plan(length)
            for length in (window + 5 * block_size, window + 7 * block_size + 1)
        ]
        tokens = [[min(t, p.num_full_blocks) for t in row[:heads]] for row, p in
                  zip((one[0], two[0]), plans, strict=True)]  # fmt: skip
        facts = (
            torch.tensor([getattr(plan, name) for plan in plans])
            for name in ("tail", "num_kept_blocks", "num_full_blocks")
        )
        both = pages_from_tokens(torch.tensor(tokens), window, *facts, block_size)
        alone = [
            pages_row((row, window, plan, block_size))
            for row, plan in zip(tokens, plans, strict=True)
        ]
        assert both.tolist() == alone

    def test_even_tokens_get_even_pages(self):
        plan = BlockPlanner(32, 32, 96).plan(1000)
        assert pages_row(([64] * 4, 32, plan, 32)) == [plan.num_kept_blocks] * 4


def test_uniform_gives_everyone_the_capacity():
    assert allocate_row(Uniform(), [SPIKY, FLAT], 5) == [5, 5]
    assert Uniform.even


def test_table_rows_stand_under_their_own_name():
    assert all(allocator.name == name for name, allocator in ALLOCATORS.items())
