# SPDX-License-Identifier: Apache-2.0
"""The Triton selection kernel against its definition, index by index."""

import math

import pytest
import torch
from selections import score_rows

from vllm_kvcompress.kernels import reference, selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


pytestmark = pytest.mark.usefixtures("programs")


def equals_the_reference(scores, count, candidates, protected_end, max_count) -> None:
    tensors = (scores, count, candidates, protected_end)
    expected = reference.select_tokens(*tensors, max_count)
    found = selection.select_tokens(*(t.to(DEVICE) for t in tensors), max_count)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", ["normal", "small", "ties", "special", "bits"])
@pytest.mark.parametrize("length", [1, 63, 1000, 4097])
def test_every_budget(kind, length):
    """One head per budget: nothing, everything, and what lies between."""
    budgets = sorted({0, 1, length // 3, length // 2, length - 1, length})
    scores = score_rows(kind, 1, len(budgets), length)
    full = torch.tensor([length])
    equals_the_reference(scores, torch.tensor([budgets]), full, full, length)


@pytest.mark.parametrize(("kind", "slack"), [("normal", 5), ("special", 0)])
def test_ragged_requests(kind, slack):
    """Requests of unlike lengths with pinned ranges, a count for each head, garbage behind."""
    length, candidates, protected_end = 4200, [4097, 1000, 0, 63], [4128, 1000, 32, 64]
    scores = score_rows(kind, 4, 3, length)
    for row, end in enumerate(candidates):
        scores[row, :, end:] = math.nan if row % 2 else math.inf
    counts = torch.tensor([[31, 32, 4128], [0, 999, 1000], [32, 32, 32], [1, 17, 64]])
    equals_the_reference(
        scores, counts, torch.tensor(candidates), torch.tensor(protected_end), 4128 + slack
    )


@pytest.mark.parametrize("candidates", [512, 700])
def test_pinned_range_in_several_tiles(candidates):
    """Tiles in its middle and at its end have no candidate; fewer are kept than are pinned."""
    scores = score_rows("normal", 1, 3, 2100)
    ends = torch.tensor([candidates]), torch.tensor([2000])
    counts = torch.tensor([[2000, 1900, 1200]])
    equals_the_reference(scores, counts, *ends, 2000)


def test_inputs_of_any_stride():
    """Counts may be expanded views, scores transposed ones."""
    scores = score_rows("normal", 3, 2, 100).transpose(0, 1)
    count = torch.tensor([10, 60])[:, None].expand(-1, 3)
    ends = torch.tensor([[90, 95], [95, 100]])
    equals_the_reference(scores, count, ends[:, 0], ends[:, 1], 60)


def test_ties_in_several_tiles():
    """Ten of 4150 equal scores, then the fifty that are larger."""
    scores = torch.zeros(1, 1, 4200)
    scores[..., 4150:] = 1
    full = torch.tensor([4200])
    equals_the_reference(scores, torch.tensor([[60]]), full, full, 60)


def test_output_is_not_wider_than_the_prompt():
    scores = score_rows("normal", 1, 1, 20)
    full = torch.tensor([20])
    found = selection.select_tokens(
        scores.to(DEVICE), full[None].to(DEVICE), full.to(DEVICE), full.to(DEVICE), 64
    )
    assert found.cpu()[0, 0].tolist() == list(range(20))
