# SPDX-License-Identifier: Apache-2.0
"""Published numbers, and what a head keeps; inputs are made by ``vllm_kvcompress.testing``."""

import pytest
import torch

from vllm_kvcompress import kernels


def published(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def six_digits(values) -> object:
    """Equal to a published number, which has six decimals."""
    return pytest.approx(values, abs=6e-7)


def best(scores: torch.Tensor, capacity: int) -> list[set[int]]:
    """Positions that each head of [Hkv, n] keeps of the n that compete."""
    heads, length = scores.shape
    chosen = kernels.select_tokens(
        scores[None],
        torch.full((1, heads), capacity),
        torch.tensor([length]),
        torch.tensor([length]),
        capacity,
    )
    return [set(row) for row in chosen[0].tolist()]
