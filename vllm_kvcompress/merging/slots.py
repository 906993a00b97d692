# SPDX-License-Identifier: Apache-2.0
"""Sums of token rows by the slot that they go to."""

import torch

from vllm_kvcompress.merging.base import MergeContext


def kept_positions(ctx: MergeContext) -> torch.Tensor:
    """[R, Hkv, K] int64, T in unused entries."""
    assert ctx.kept is not None, "a merge runs after the selection"
    return ctx.kept


def take(rows: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows [R, Hkv, T, D] of the kept positions, [R, Hkv, K, D]; anything in unused entries."""
    index = kept.clamp(max=rows.shape[2] - 1)[..., None]
    return rows.gather(2, index.expand(-1, -1, -1, rows.shape[3]))


def dropped(ctx: MergeContext) -> torch.Tensor:
    """[R, Hkv, T] bool, positions below in_pages that are not kept."""
    num_heads, length = ctx.final.shape[1:]
    position = torch.arange(length, device=ctx.final.device)
    gone = (position < ctx.in_pages[:, None])[:, None].expand(-1, num_heads, -1)
    gone = torch.nn.functional.pad(gone, (0, 1))  # unused entries point one past the end
    return gone.scatter(2, kept_positions(ctx), False)[..., :length]


def add_up(rows: torch.Tensor, slot: torch.Tensor, num_slots: int) -> torch.Tensor:
    """Sums [R, Hkv, K, ...] of rows [R, Hkv, T, ...] by slot [R, Hkv, T]; slot K is nowhere."""
    shape = (*rows.shape[:2], num_slots + 1, *rows.shape[3:])
    index = slot.view(*slot.shape, *[1] * (rows.dim() - 3)).expand_as(rows)
    return rows.new_zeros(shape).scatter_add_(2, index, rows)[:, :, :num_slots]


def mean_with_own(own: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mean of a kept row and those that joined it; rows that nobody joined stay bit for bit.

    Args:
        own: [R, Hkv, K, D] kept rows.
        total: [R, Hkv, K, D] sums of the rows that joined.
        count: [R, Hkv, K] how many joined.
    """
    count = count[..., None]
    return torch.where(count > 0, (own + total) / (1 + count), own)
