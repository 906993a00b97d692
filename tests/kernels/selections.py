# SPDX-License-Identifier: Apache-2.0
"""Scores to select from."""

import math

import torch


def score_rows(kind: str, num: int, heads: int, length: int) -> torch.Tensor:
    """[num, heads, length] float32 of a kind: "normal", "small", "ties", "special" or "bits"."""
    generator = torch.Generator().manual_seed(length)
    scores = torch.randn(num, heads, length, generator=generator)
    if kind == "small":  # like probabilities: few exponents, all digits differ
        scores = scores.abs() * 1e-4
    elif kind == "ties":
        scores = scores.mul(2).round()  # -0.0 among them
    elif kind == "special":
        pool = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, 1.0, -1.0])
        scores = pool[torch.randint(0, len(pool), scores.shape, generator=generator)]
    elif kind == "bits":  # every float there is, NaN payloads of both signs included
        bits = torch.randint(-(2**31), 2**31, scores.shape, generator=generator)
        scores = bits.int().view(torch.float32)
    return scores
