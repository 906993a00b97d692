# SPDX-License-Identifier: Apache-2.0
"""The Triton apportionment against its definition, and that against dealing one by one."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.allocation.rounding import apportion_host
from vllm_kvcompress.kernels import budgets, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def equals_the_reference(shares, total, low, high) -> None:
    tensors = (shares, total, low, high)
    expected = reference.apportion(*tensors)
    found = budgets.apportion(*(tensor.to(DEVICE) for tensor in tensors))
    assert torch.equal(found.cpu(), expected)


@settings(max_examples=30)
@given(
    shares=st.lists(st.integers(0, 400), min_size=1, max_size=9),
    parts=st.sampled_from([1, 2, 3, 7, 10]),
    total=st.integers(0, 400),
    low=st.integers(0, 12),
    room=st.integers(0, 60),
)
def test_dealt_one_by_one(shares, parts, total, low, room):
    """Equal fractions tie, entries fill up, cards go round more than once."""
    expected = apportion_host([Fraction(x, parts) for x in shares], total, low, low + room)
    numbers = (torch.tensor([x]) for x in (total, low, low + room))
    tensors = (torch.tensor([shares]).double() / parts, *numbers)
    assert reference.apportion(*tensors)[0].tolist() == expected
    equals_the_reference(*tensors)


@pytest.mark.parametrize("count", [1, 4, 112, 1024, 1100])
@pytest.mark.parametrize("kind", ["random", "ties", "huge"])
def test_equals_the_reference(count, kind):
    """Totals too small and too large for the bounds among them."""
    generator = torch.Generator().manual_seed(count)
    shares = 90 * torch.rand(4, count, generator=generator, dtype=torch.float64) - 3
    if kind == "ties":
        shares = (shares * 4).round() / 4
    elif kind == "huge":
        shares = shares * 1e6
    middle = shares.clamp(2, 70).sum(1)
    total = (middle * torch.tensor([0.0, 0.9, 1.3, 9.0])).long()
    low, high = torch.tensor([2, 0, 3, 1]), torch.tensor([70, 2**24, 64, 80])
    equals_the_reference(shares, total, low, high)


def test_fractions_are_rounded_as_defined():
    """Where a product lies between two whole numbers decides who comes first."""
    generator = torch.Generator().manual_seed(0)
    shares = 40 * torch.rand(40, 1, generator=generator, dtype=torch.float64)
    shares = shares + torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]).double() * 1e-9
    total = torch.randint(0, 6, (40,), generator=generator) + (5 * shares[:, 0].floor()).long()
    equals_the_reference(shares, total, torch.zeros_like(total), torch.full_like(total, 50))
