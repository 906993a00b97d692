# SPDX-License-Identifier: Apache-2.0
"""The Triton counting kernels against their definition, and that against a loop."""

import math

import pytest
import torch

from vllm_kvcompress.kernels import head_budgets, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def base_scores(kind: str, num_candidates: list[int], heads: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    shape = (len(num_candidates), heads, length)
    scores = (2 * torch.randn(shape, generator=generator)).exp()
    scores = scores * (1 + torch.arange(heads))[:, None]  # heads of unlike mass
    if kind == "ties":
        scores = torch.randint(0, 9, shape, generator=generator) / 16
    elif kind == "signed":
        scores = scores - scores.median()
    elif kind == "special":
        pool = torch.tensor([0.0, -0.0, 1.0, 2.0, -1.0, math.nan, -math.inf])
        scores = pool[torch.randint(0, len(pool), shape, generator=generator)]
        scores[:, 0] = math.nan
    for row, end in enumerate(num_candidates):
        scores[row, :, end:] = -math.inf
    return scores


def naive_counts(base: list[list[float]], capacity: int, normalize: bool) -> list[int]:
    """One request, without any tensor operation but float32 products."""
    ranked = [sorted((-math.inf if x != x else x for x in row), reverse=True) for row in base]
    if normalize:
        for row in ranked:
            mass = [max(x, 0) for x in row]
            share = sum(mass[:capacity]) / sum(mass) if sum(mass) else 1
            row[:] = (torch.tensor(row) * torch.tensor(share)).tolist()
    entries = [(-x, head) for head, row in enumerate(ranked) for x in row]
    best = sorted(entries)[: len(base) * capacity]
    return [sum(owner == head for _, owner in best) for head in range(len(base))]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["mass", "ties", "signed", "special"])
def test_the_definition(kind, normalize):
    capacities = [7, 1, 20]
    base = base_scores(kind, [30, 12, 20], 3, 32)
    found = reference.head_counts(base, torch.tensor(capacities), normalize)
    expected = [
        naive_counts(rows, capacity, normalize)
        for rows, capacity in zip(base.tolist(), capacities, strict=True)
    ]
    assert found.tolist() == expected
    assert found.sum(1).tolist() == [3 * capacity for capacity in capacities]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("heads", "capacity", "counts"),
    [
        # an infinite score leaves its head as it is
        ([[math.inf, 1.0, 1.0, 1.0], [2.0, 0.5, 0.5, 3.0]], 2, [2, 2]),
        # NaN ties with -inf: lower heads first
        ([[math.nan] * 4, [1.0, -math.inf, -math.inf, -math.inf]], 3, [4, 2]),
        # a head without mass still comes before one without scores
        ([[-math.inf] * 4, [0.0] * 4], 2, [0, 4]),
    ],
)
def test_special_scores(heads, capacity, counts, normalize):
    base, capacity = torch.tensor([heads]), torch.tensor([capacity])
    found = head_budgets.head_counts(base.to(DEVICE), capacity.to(DEVICE), normalize)
    assert found.tolist() == reference.head_counts(base, capacity, normalize).tolist() == [counts]


KINDS = ("mass", "ties", "signed", "special")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("length", "kind", "normalize"),
    [  # all pairs
        (length, kind, bool((i + j) % 2))
        for i, length in enumerate((1, 63, 1000, 4097))
        for j, kind in enumerate(KINDS)
    ],
)
def test_equals_the_reference(length, kind, normalize):
    """Small, middling and full budgets of requests of unlike lengths."""
    scored = [length, length, length, max(1, length // 3)]
    budgets = [length // 20, length - 1, length, length // 4]
    if length > 4096:  # more than a block of the kernels, and slow to interpret
        scored, budgets = scored[2:], [length - 1, length // 4]
    capacity = torch.tensor(budgets).clamp_min(1)
    base = base_scores(kind, scored, 2 + (length < 1000), length)
    expected = reference.head_counts(base, capacity, normalize)
    found = head_budgets.head_counts(base.to(DEVICE), capacity.to(DEVICE), normalize)
    assert torch.equal(found.cpu(), expected)
