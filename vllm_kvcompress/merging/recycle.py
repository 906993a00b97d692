# SPDX-License-Identifier: Apache-2.0
"""Dropped tokens of an image end up in its bin."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.merging.base import Merge, MergeContext
from vllm_kvcompress.merging.bins import bin_slots, last_of_each, ranking, sizes
from vllm_kvcompress.merging.slots import add_up, dropped, kept_positions, take
from vllm_kvcompress.options import require_whole
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class Recycle(Merge):
    """Extra entries per image (or temporal patch): means of its dropped tokens, by their score.

    Bins take slots of the budget and stand after the kept tokens, image by image. With several bins
    per image each stands for a run of its dropped tokens in the order of the prompt.
    Source: Myopia Rectification, CVPR 2026 Findings, which names the idea but gives no formula.

    Adaptation notes: a reconstruction. A budget too small for a bin per image gets one bin for all
    of them; a single free slot keeps a token instead.

    Options:
        bins: entries per image.
    """

    name: ClassVar[str] = "recycle"
    source: ClassVar[str] = "Myopia Rectification, CVPR 2026 Findings"
    cost: ClassVar[str] = "2*L*Hkv*P*D and a sort of L*Hkv*P scores"
    reconstruction: ClassVar[bool] = True
    needs_segments: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    bins: int = 1

    def __post_init__(self) -> None:
        require_whole("bins", self.bins, 1)

    def num_tokens(self, ctx: MergeContext) -> torch.Tensor:
        """The fewest tokens that fill the slots together with the bins of all that they leave.

        The last ``bins`` tokens of an image in ranking order hold its bins open: with J tokens kept
        there are as many bins as such holders are dropped. So J is where the number of other tokens
        reaches what the bins leave of the slots.
        """
        segment, limit = self._bin_segments(ctx)
        order = ranking(ctx)
        holds = last_of_each(segment.gather(2, order), limit, ctx.num_segments)
        others = (~holds).cumsum(2)
        wanted = ctx.slots - holds.sum(2)
        return (wanted > 0).long() + (others < wanted[..., None]).sum(2)

    def workspace(self, row: RowShape, num_slots: int) -> int:
        return row.keys + 40 * row.scores + 8 * num_slots * row.head_size

    def merge(self, ctx: MergeContext) -> tuple[torch.Tensor, torch.Tensor]:
        kept = kept_positions(ctx)
        num_slots = kept.shape[2]
        segment, limit = self._bin_segments(ctx)
        segment = segment.masked_fill(~dropped(ctx), -1)
        slot = bin_slots(segment, limit, (kept < segment.shape[2]).sum(2), ctx.num_segments)
        slot = slot.masked_fill(segment < 0, num_slots)

        score = ctx.final.nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
        total = add_up(score, slot, num_slots)
        count = add_up(torch.ones_like(score), slot, num_slots)
        # a bin whose tokens all score 0 is their plain mean
        divisor = torch.where(total > 0, total, count)
        weight = torch.where(_at(total, slot) > 0, score, 1.0) / _at(divisor, slot)

        def fill(rows: torch.Tensor) -> torch.Tensor:
            bins = add_up(rows * weight[..., None], slot, num_slots)
            return torch.where(count[..., None] > 0, bins, take(rows, kept))

        return fill(ctx.keys), fill(ctx.values)

    def _bin_segments(self, ctx: MergeContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens share bins, and how many bins they share.

        Returns:
            [R, Hkv, T] int64, -1 at tokens that go into no bin; [R, Hkv] int64.
        """
        assert ctx.segment is not None
        segment = ctx.segment.masked_fill(~ctx.competes, -1)
        most = sizes(segment, ctx.num_segments).clamp(max=self.bins).sum(1, keepdim=True)
        free = ctx.slots - (ctx.in_pages - ctx.competes.sum(1))[:, None]
        each = free > most
        joint = ~each & (free > 1)
        shared = torch.where(each[..., None], segment[:, None], 0)
        shared = shared.masked_fill((segment < 0)[:, None] | ~(each | joint)[..., None], -1)
        return shared, torch.where(each, self.bins, 1)


def _at(per_slot: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Values [R, Hkv, K] at slots [R, Hkv, T]; 1 at slot K, which is nowhere."""
    return torch.nn.functional.pad(per_slot, (0, 1), value=1.0).gather(2, slot)
