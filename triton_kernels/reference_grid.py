# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of what scores know of images and of a layer's output."""

from typing import NamedTuple

import torch

TINY = 1e-30
"""Least mass that is divided by."""


class Grids(NamedTuple):
    """Rows and columns of the images of R rows.

    Attributes:
        segment: [R, T] int64, image of a visual token, else -1.
        lines: [R, M, 4] int64 of each image: first position, end, width and step. Its rows of
            ``width`` tokens begin every ``step`` positions. Step 0: its grid does not count.
    """

    segment: torch.Tensor
    lines: torch.Tensor


def grid_balance(scores: torch.Tensor, num_candidates: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Whether scores of an image lie along its rows (positive) or along its columns (negative).

    The sum over its tokens of the geometric mean of a token's score and that of its right
    neighbour, minus the same for the neighbour below. Tokens t >= n do not count.

    Args:
        scores: [R, Hkv, T] float32, not negative at t < n.
        num_candidates: [R] int64, n.

    Returns:
        [R, Hkv, M] float32; 0 where the grid does not count.
    """
    position = torch.arange(scores.shape[2], device=scores.device)
    first, end, width, step = token_lines(grids)
    count = num_candidates[:, None]
    inside = (step > 0) & (position < count)
    column = (position - first) % step.clamp_min(1)
    right = inside & (column + 1 < width) & (position + 1 < count)
    below = inside & (position + step < torch.minimum(end, count))
    total = torch.zeros_like(scores, dtype=torch.float64)
    clean = scores.masked_fill(~(position < count)[:, None], 0.0)
    for neighbour, exists, sign in ((position + 1, right, 1), (position + step, below, -1)):
        index = torch.where(exists, neighbour, 0)
        near = clean.gather(2, index[:, None].expand_as(clean))
        total += sign * (clean * near).sqrt().double().masked_fill(~exists[:, None], 0.0)
    num, num_heads, _ = scores.shape
    balance = total.new_zeros(num, num_heads, grids.lines.shape[1])
    image = grids.segment.clamp(0, grids.lines.shape[1] - 1)
    total = total.masked_fill(~inside[:, None], 0.0)
    return balance.scatter_add(2, image[:, None].expand_as(total), total).float()


def token_lines(grids: Grids) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """First position, end, width and step of each token's image, [R, T] each; 0 on text."""
    segment, lines = grids
    index = segment.clamp(0, lines.shape[1] - 1)[..., None].expand(-1, -1, 4)
    found = lines.gather(1, index).masked_fill((segment < 0)[..., None], 0)
    first, end, width, step = found.unbind(-1)
    return first, end, width, step


def pool_columns(
    scores: torch.Tensor, num_candidates: torch.Tensor, kernel: int, kind: str, grids: Grids
) -> torch.Tensor:
    """Pooling along the columns of images, as ``pool_prefix`` pools along the prompt.

    Returns:
        [R, Hkv, T]; garbage at tokens whose image's grid does not count.
    """
    position = torch.arange(scores.shape[2], device=scores.device)
    first, end, _, step = token_lines(grids)
    stop = torch.minimum(end, num_candidates[:, None])
    nothing = 0.0 if kind == "avg" else float("-inf")
    pooled = torch.full_like(scores, nothing)
    for tap in range(-(kernel // 2), kernel // 2 + 1):
        at = position + tap * step
        exists = (at >= first) & (at < stop)
        near = scores.gather(2, torch.where(exists, at, 0)[:, None].expand_as(scores))
        near = near.masked_fill(~exists[:, None], nothing)
        pooled = pooled + near if kind == "avg" else torch.maximum(pooled, near)
    return pooled / kernel if kind == "avg" else pooled


def weigh_scores(
    base: torch.Tensor,
    num_candidates: torch.Tensor,
    weight: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    *,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Window scores that are raised to their mean and multiplied by a weight.

    Args:
        base: [R, Hkv, T] float32, pooled window mean.
        num_candidates: [R] int64, n.
        weight: [R, Hkv, T] float32, of each token; None for 1.
        last: [R, Hkv, T] float32, pooled scores of the last row.
        clamp: raise scores below the mean over the n tokens to that.

    Returns:
        The new base, and ``last`` brought to the same sum over the n tokens. Both are 0 at t >= n.
    """
    position = torch.arange(base.shape[2], device=base.device)
    outside = (position >= num_candidates[:, None])[:, None]
    base = base.masked_fill(outside, 0.0)
    if clamp:
        count = num_candidates.clamp_min(1)[:, None, None]
        base = torch.maximum(base, base.sum(2, keepdim=True) / count)
    if weight is not None:
        base = base * weight
    base = base.masked_fill(outside, 0.0)
    if last is None:
        return base, None
    last = last.masked_fill(outside, 0.0)
    mass = base.sum(2, keepdim=True) / last.sum(2, keepdim=True).clamp_min(TINY)
    return base, last * mass
