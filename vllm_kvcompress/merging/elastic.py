# SPDX-License-Identifier: Apache-2.0
"""Dropped tokens join the nearest kept token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.merging.base import Merge, MergeContext
from vllm_kvcompress.merging.slots import add_up, dropped, kept_positions, mean_with_own, take
from vllm_kvcompress.options import require_whole
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class Elastic(Merge):
    """Each dropped token joins the kept token at the smallest distance in the prompt.

    A kept key becomes the mean of itself and what joined it, and its value likewise. The first
    tokens and the last one are kept, but joined by none.
    Source: Elastic Cache, arXiv 2407.18121.

    Adaptation notes: distances are between true positions (the released code forgets the offset of
    the sinks). Merging stays inside the prompt's full blocks; a head without anchor there merges
    nothing.

    Options:
        sinks: how many tokens at the start are not joined.
    """

    name: ClassVar[str] = "elastic"
    source: ClassVar[str] = "Elastic Cache, arXiv 2407.18121"
    cost: ClassVar[str] = "2*L*Hkv*P*D"
    needs_shared_sets: ClassVar[bool] = True

    sinks: int = 1

    def __post_init__(self) -> None:
        require_whole("sinks", self.sinks, 0)

    def workspace(self, row: RowShape, num_slots: int) -> int:
        return 14 * row.scores + 8 * num_slots * row.head_size

    def merge(self, ctx: MergeContext) -> tuple[torch.Tensor, torch.Tensor]:
        kept = kept_positions(ctx)
        num_slots = kept.shape[2]
        gone = dropped(ctx)
        slot = self._nearest_anchor(ctx, kept).masked_fill(~gone, num_slots)
        count = add_up(gone.float(), slot, num_slots)

        def blend(rows: torch.Tensor) -> torch.Tensor:
            return mean_with_own(take(rows, kept), add_up(rows, slot, num_slots), count)

        return blend(ctx.keys), blend(ctx.values)

    def _nearest_anchor(self, ctx: MergeContext, kept: torch.Tensor) -> torch.Tensor:
        """Slot of the anchor that is nearest to each position (ties: the lower), [R, Hkv, T].

        K where a head has no anchor.
        """
        length = ctx.final.shape[2]
        # out of reach of every position, at the end where it keeps the order ascending
        far = 2 * length
        last = (ctx.prompt_lens - 1)[:, None, None]
        anchors = kept.masked_fill(kept < self.sinks, -far).masked_fill(kept >= last, 2 * far)
        position = torch.arange(length, device=kept.device).expand(*kept.shape[:2], -1)
        above = torch.searchsorted(anchors, position.contiguous())
        anchors = torch.nn.functional.pad(anchors, (1, 0), value=-far)
        anchors = torch.nn.functional.pad(anchors, (0, 1), value=2 * far)
        down = position - anchors.gather(2, above)
        up = anchors.gather(2, above + 1) - position
        nearest = torch.where(down <= up, above - 1, above)
        return nearest.masked_fill(torch.minimum(down, up) >= far, kept.shape[2])
