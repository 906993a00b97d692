# SPDX-License-Identifier: Apache-2.0
"""Hidden states that stand for tokens not decoded yet, and what groups of them vote for."""

import functools

import torch

from vllm_kvcompress.scoring.base import HiddenMoments


def mean_and_deviation(
    hidden: HiddenMoments, per_feature: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample deviation of the prompt's hidden states.

    Returns:
        [N, d] float32 each, or [N, 1] over tokens and features together.
    """
    count = hidden.count.double()[:, None]
    # float64: the difference of two large sums
    total, square = hidden.total.double(), hidden.square.double()
    if not per_feature:
        count = count * total.shape[1]
        total, square = total.sum(1, keepdim=True), square.sum(1, keepdim=True)
    mean = total / count
    variance = (square - total * mean) / (count - 1).clamp_min(1)
    return mean.float(), variance.clamp_min(0).sqrt().float()


@functools.cache
def standard_normal(
    seed: int, layer: int, rows: int, size: int, device: torch.device
) -> torch.Tensor:
    """Noise [rows, size] float32 of one layer, the same wherever it is drawn.

    Drawn on the host, whose generator does not differ between machines, and kept on the device.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * layer)
    return torch.randn(rows, size, generator=generator).to(device)


def count_votes(masses: torch.Tensor, end: torch.Tensor, tau: float, cover: str) -> torch.Tensor:
    """Number of groups whose cover holds a token, [N, Hkv, T] float32.

    A group's cover is a prefix of the tokens in order of decreasing mass, ties by position.

    Args:
        masses: [N, Hkv, NG, T] attention that each group pays, any scale; not negative.
        end: [N] int64, tokens at t >= end stand outside.
        tau: share of a group's mass that its cover holds.
        cover: the longest prefix of at most that share ("floor"), or the shortest of at least that
            share ("min").
    """
    position = torch.arange(masses.shape[3], device=masses.device)
    outside = (position >= end[:, None])[:, None, None]
    ranked = masses.masked_fill(outside, -1.0).sort(dim=3, descending=True, stable=True)
    held = ranked.values.clamp_min(0).cumsum(3)
    goal = tau * held[..., -1:]
    if cover == "floor":
        covered = held <= goal
    else:
        covered = torch.nn.functional.pad(held[..., :-1], (1, 0)) < goal
    return torch.zeros_like(masses).scatter(3, ranked.indices, covered.float()).sum(2)
