# SPDX-License-Identifier: Apache-2.0
"""How dropped tokens are dealt to bins. S segments, of which a prompt may have fewer."""

import torch

from vllm_kvcompress.merging.base import MergeContext


def ranking(ctx: MergeContext) -> torch.Tensor:
    """Positions in the order in which a head keeps them, [R, Hkv, T] int64.

    What cannot be dropped comes first, then what competes (score descending, position ascending,
    NaN last), then what is not in the full blocks.
    """
    score = ctx.final.masked_fill(ctx.final.isnan(), float("-inf"))
    order = score.argsort(dim=2, descending=True, stable=True)
    position = torch.arange(score.shape[2], device=score.device)
    turn = ctx.competes.long().masked_fill(position >= ctx.in_pages[:, None], 2)
    turn = turn[:, None].expand_as(order).gather(2, order)
    return order.gather(2, turn.argsort(dim=2, stable=True))


def sizes(segment: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Tokens of each segment [..., T], -1 counting nowhere: [..., S + 1], the last of them 0."""
    shape = (*segment.shape[:-1], num_segments + 2)
    counts = torch.zeros(shape, dtype=torch.int64, device=segment.device)
    return counts.scatter_add_(-1, segment + 1, torch.ones_like(segment))[..., 1:]


def last_of_each(segment: torch.Tensor, limit: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Which entries are among the last ``limit`` [R, Hkv] of their segment, [R, Hkv, T] bool.

    Args:
        segment: [R, Hkv, T] int64, -1 for none.
    """
    order = segment.argsort(dim=2, stable=True)
    index = torch.arange(order.shape[2], device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter_(2, order, index)  # in a list sorted by segment
    outside = (segment < 0).sum(2, keepdim=True)
    ends = outside + sizes(segment, num_segments).cumsum(2)
    left = ends.gather(2, segment.clamp(min=0)) - place
    return (segment >= 0) & (left <= limit[..., None])


def bin_slots(
    segment: torch.Tensor, limit: torch.Tensor, first: torch.Tensor, num_segments: int
) -> torch.Tensor:
    """Slot of the bin that each token goes to, [R, Hkv, T] int64; anything where it goes to none.

    A segment's tokens are split, in position order, into as many runs of near-equal length as it
    has bins: ``limit``, or one per token. Longer runs come first. Bins stand in segment order.

    Args:
        segment: [R, Hkv, T] int64, ascending but for -1, which goes to no bin.
        limit: [R, Hkv] int64, bins per segment.
        first: [R, Hkv] int64, slot of a head's first bin.
    """
    members = sizes(segment, num_segments)
    runs = torch.minimum(members, limit[..., None])
    starts = first[..., None] + runs.cumsum(2) - runs
    before = members.cumsum(2) - members
    own = segment.clamp(min=0)
    place = (segment >= 0).cumsum(2) - 1 - before.gather(2, own)
    num_runs = runs.gather(2, own).clamp(min=1)
    short = members.gather(2, own) // num_runs
    num_long = members.gather(2, own) % num_runs
    edge = num_long * (short + 1)  # tokens in the longer runs
    run = torch.where(
        place < edge, place // (short + 1), num_long + (place - edge) // short.clamp(min=1)
    )
    return starts.gather(2, own) + run
