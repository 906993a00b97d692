# SPDX-License-Identifier: Apache-2.0
"""Allocators and integer apportionment: published examples and properties."""

from fractions import Fraction
from typing import NamedTuple

import lcg
import numpy as np
import oracle
import pytest
import torch
from budgets import observed_of, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation import (
    ALLOCATORS,
    Scope,
    apportion,
    apportion_host,
    pages_from_kept,
)
from vllm_kvcompress.allocation.adakv import AdaKV
from vllm_kvcompress.allocation.uniform import Uniform
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
    num_candidates = torch.tensor([base.shape[2]])
    return tokens_of(allocator, base, num_candidates, torch.tensor([capacity]))[0].tolist()


def linear_schedule(num_layers, budget, beta, num_candidates) -> list[Fraction]:
    """Real-valued pyramid budgets: a line from high to low with the given mean."""
    low = Fraction(budget, beta)
    high = 2 * budget - low
    if high >= num_candidates:
        high = Fraction(num_candidates)
        low = 2 * budget - high
    return [high - (high - low) * layer / (num_layers - 1) for layer in range(num_layers)]


@st.composite
def apportionments(draw):
    """Shares with small denominators, so that exact ties happen, and totals near and far."""
    count = draw(st.integers(1, 9))
    denominator = draw(st.sampled_from([1, 2, 3, 5, 8, 10, 32]))
    shares = draw(
        st.lists(st.integers(-20 * denominator, 60 * denominator), min_size=count, max_size=count)
    )
    low = draw(st.integers(0, 10))
    high = draw(st.integers(low, 40))
    near = sum(min(max(share // denominator, low), high) for share in shares)
    rest = st.integers(max(-near, -count), 2 * count).map(lambda rest: near + rest)
    total = draw(rest | st.integers(0, 45 * count))
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
    def test_the_host_agrees(self, case):
        shares, total, low, high = case
        result = apportion_row(shares, total, low, high)
        assert apportion_host(shares, total, low, high) == result
        assert apportion_host([float(share) for share in shares], total, low, high) == result

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
        assert observed_of(allocator, torch.tensor([base]), torch.tensor([5])).tolist() == [counts]
        assert allocate_row(allocator, base, 5) == exact
        rounded = AdaKV(alpha=alpha, normalize=normalize, rounding="official")
        assert allocate_row(rounded, base, 5) == official

    def test_pages_give_back_what_released_integers_lose(self):
        """At block size 1, too: the released code would keep 9 tokens of 10."""
        kept = torch.tensor([allocate_row(AdaKV(alpha=0.5, normalize=False, rounding="official"),
                                          [SPIKY, FLAT], 5)])  # fmt: skip
        zero, ample = torch.tensor([0]), torch.tensor([100])
        pages = pages_from_kept(kept, zero, zero, torch.tensor([5]), ample, 1)
        assert kept.sum() == 9
        assert pages.sum() == 10

    def test_second_layer_of_the_worked_example(self):
        """Budgets are counted on the window score, also when bacon ranks."""
        trace = LayerTrace()
        contexts = [lcg.layer_context(layer, 4, trace) for layer in (0, 1)]
        bacon = [Bacon().score(ctx) for ctx in contexts][1]
        window = SnapKV().score(contexts[1])
        base = bacon.base
        assert base[..., : lcg.NUM_SCORED].equal(window.base[..., : lcg.NUM_SCORED])
        assert base[..., lcg.NUM_SCORED :].isneginf().all()
        num_candidates, capacity = torch.tensor([lcg.NUM_SCORED]), torch.tensor([4])
        allocator = AdaKV(alpha=0.5)
        assert observed_of(allocator, base, capacity).tolist() == [[3, 5]]
        assert tokens_of(allocator, base, num_candidates, capacity).tolist() == [[4, 4]]


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
        counts = observed_of(allocator, torch.tensor([base]), torch.tensor([capacity]))
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
        result = tokens_of(
            allocator,
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


class PageCase(NamedTuple):
    """Kept tokens of each head that an allocator could give, and what the plan says."""

    kept: list[int]
    tail: int
    fixed: int
    num_kept_blocks: int
    num_full_blocks: int


@st.composite
def page_cases(draw, heads=None, block_size=None):
    heads = heads or draw(st.integers(1, 6))
    block_size = block_size or draw(st.sampled_from([4, 16, 32]))
    num_full = draw(st.integers(2, 12))
    tail = draw(st.integers(0, block_size - 1))
    num_kept = draw(st.integers(1, num_full - 1))
    fixed = draw(st.integers(0, num_kept * block_size))
    most = num_full * block_size + tail
    kept = draw(st.lists(st.integers(0, most), min_size=heads, max_size=heads))
    return PageCase(kept, tail, fixed, num_kept, num_full), block_size


def pages_of(cases: list[PageCase], block_size: int) -> list[list[int]]:
    columns = (torch.tensor(column) for column in zip(*cases, strict=True))
    return pages_from_kept(*columns, block_size).tolist()


class TestPages:
    @given(page_cases())
    def test_group_holds_its_pages(self, drawn):
        case, block_size = drawn
        [pages] = pages_of([case], block_size)
        assert sum(pages) == case.num_kept_blocks * len(case.kept)
        least = -(-case.fixed // block_size)
        assert all(least <= count <= case.num_full_blocks for count in pages)
        assert [pages] == pages_of([case], block_size)

    @given(page_cases())
    def test_equals_the_loop(self, drawn):
        case, block_size = drawn
        shares = [Fraction(kept - case.tail, block_size) for kept in case.kept]
        total = case.num_kept_blocks * len(case.kept)
        least = -(-case.fixed // block_size)
        expected = oracle.apportion(shares, total, least, case.num_full_blocks)
        assert pages_of([case], block_size) == [expected]

    @given(page_cases(heads=4, block_size=16), page_cases(heads=4, block_size=16))
    def test_rows_are_independent(self, one, two):
        cases = [one[0], two[0]]
        assert pages_of(cases, 16) == [pages_of([case], 16)[0] for case in cases]

    def test_even_tokens_get_even_pages(self):
        assert pages_of([PageCase([96] * 4, 8, 24, 3, 31)], 32) == [[3] * 4]

    def test_a_head_has_no_more_pages_than_the_prompt(self):
        """What the first head cannot use goes to the others."""
        assert pages_of([PageCase([320, 0, 0], 0, 0, 3, 4)], 32) == [[4, 3, 2]]


def test_uniform_is_known_from_the_prompt_length():
    assert Uniform.scope is Scope.UNIFORM


def test_table_rows_stand_under_their_own_name():
    assert all(allocator.name == name for name, allocator in ALLOCATORS.items())
