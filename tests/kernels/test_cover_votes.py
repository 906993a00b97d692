# SPDX-License-Identifier: Apache-2.0
"""Votes by threshold search, by sorting, and by adding up fractions."""

from fractions import Fraction
from math import ceil, floor, frexp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import DEVICE

from vllm_kvcompress.kernels import reference, votes

COVERS = ("floor", "min")


def naive(masses, end, tau, cover):
    """Exact arithmetic on Python's numbers, one row at a time."""
    share = Fraction(round(tau * 2**30), 2**30)
    counts = torch.zeros(masses.shape[0], masses.shape[1], masses.shape[3])
    for n, heads in enumerate(masses.tolist()):
        for h, groups in enumerate(heads):
            for row in groups:
                row = row[: int(end[n])]
                # in units: 39 bits of the largest
                exponent = frexp(max(row, default=0.0))[1]
                units = [floor(Fraction(x) * Fraction(2) ** (39 - exponent)) for x in row]
                goal = share * sum(units)
                held = 0
                for t in sorted(range(len(row)), key=lambda t: (-row[t], t)):
                    if held + units[t] > floor(goal) if cover == "floor" else held >= ceil(goal):
                        break
                    held += units[t]
                    counts[n, h, t] += 1
    return counts


def check(masses, end, tau, cover):
    """Both implementations, with NaN past the end."""
    expected = naive(masses, end, tau, cover)
    outside = torch.arange(masses.shape[3]) >= end[:, None]
    masses = masses.masked_fill(outside[:, None, None], float("nan"))
    defined = reference.cover_votes(masses, end, tau, cover)
    assert defined.equal(expected)
    found = votes.cover_votes(masses.to(DEVICE), end.to(DEVICE), tau, cover)
    assert found.dtype == torch.float32
    assert found.cpu().equal(expected)


@pytest.mark.parametrize(
    ("tau", "cover"),
    [(0.0, "min"), (0.2, "floor"), (0.5, "floor"), (0.5, "min"), (0.95, "min"), (1.0, "floor")],
)
def test_peaked_rows_and_ragged_ends(tau, cover):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 2, 2, 1000, generator=generator)
    logits[:, 1] *= 12  # as rows of inflated queries: most masses are next to nothing
    check(logits.softmax(-1), torch.tensor([1000, 63, 1]), tau, cover)


@pytest.mark.parametrize("cover", COVERS)
def test_more_than_one_block(cover):
    """Ties that lie in two blocks of the kernel's loop, and a boundary among them."""
    row = torch.ones(1, 1, 1, 4500)
    row[..., ::3] = 2.0
    for tau in (0.5, 0.51, 0.97):
        check(row, torch.tensor([4097]), tau, cover)


@pytest.mark.parametrize("cover", COVERS)
@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0],
        [1e-40, 3e-41, 1e-42],  # smaller than normal numbers
        [1.2e-38, 1.1e-38, 1.1e-38],  # the first of them is a normal number
        [1.0, 1e-11, 1e-13, 0.0],  # in units: 39 bits, then a few, then none
        [3e38, 3e38, 1.0],
        [0.25, 0.25, 0.25, 0.25],
    ],
    ids=str,
)
def test_odd_numbers(row, cover):
    for tau in (0.0, 0.25, 0.5, 1.0):
        check(torch.tensor(row)[None, None, None], torch.tensor([len(row)]), tau, cover)


@settings(max_examples=20)
@given(
    numbers=st.lists(st.integers(0, 5), min_size=4, max_size=40),
    end=st.integers(1, 20),
    eighths=st.integers(0, 8),
    cover=st.sampled_from(COVERS),
)
def test_ties_and_exact_boundaries(numbers, end, eighths, cover):
    half = len(numbers) // 2
    masses = torch.tensor(numbers[: 2 * half], dtype=torch.float32).view(1, 1, 2, half)
    check(masses / 4, torch.tensor([min(end, half)]), eighths / 8, cover)


def test_the_order_of_adding_does_not_show():
    """A sum in float32 that depends on its order decides nothing."""
    generator = torch.Generator().manual_seed(1)
    row = torch.rand(2000, generator=generator)
    order = torch.randperm(2000, generator=generator)
    end = torch.tensor([2000])
    plain = reference.cover_votes(row[None, None, None], end, 0.5, "min")[0, 0]
    mixed = reference.cover_votes(row[order][None, None, None], end, 0.5, "min")[0, 0]
    values = row[plain > 0].sort().values
    assert values.equal(row[order][mixed > 0].sort().values)
