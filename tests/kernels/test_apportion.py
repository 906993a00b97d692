# SPDX-License-Identifier: Apache-2.0
"""The Triton apportionment against its definition, and that against dealing one by one."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.allocation.rounding import apportion_host
from vllm_kvcompress.kernels import budgets, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def equals_the_reference(shares, total, low, high) -> None:
    tensors = (shares, total, low, high)
    expected = reference.apportion(*tensors)
    found = budgets.apportion(*(tensor.to(DEVICE) for tensor in tensors))
    assert torch.equal(found.cpu(), expected)


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


@given(st.floats(0, 40), st.sampled_from([0.0, 5e-10, 1e-9, 1.5e-9, 1e-12]))
def test_fractions_are_rounded_as_defined(share, noise):
    """Where a product lies between two whole numbers decides who comes first."""
    shares = torch.tensor([[share, share + noise, share + 2 * noise, 3.5]], dtype=torch.float64)
    for total in (0, 61, 62, 63, 200):
        numbers = (torch.tensor([x]) for x in (total, 0, 50))
        equals_the_reference(shares, *numbers)
