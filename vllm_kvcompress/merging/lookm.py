# SPDX-License-Identifier: Apache-2.0
"""Dropped tokens join the kept token with the most similar key."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from vllm_kvcompress.merging.base import Merge, MergeContext
from vllm_kvcompress.merging.slots import add_up, dropped, kept_positions, mean_with_own, take
from vllm_kvcompress.options import require_choice
from vllm_kvcompress.workspace import RowShape

_SOURCES_AT_ONCE = 1024
"""Bounds the similarity matrix, which would be quadratic in the prompt."""


@dataclass(frozen=True)
class LookM(Merge):
    """Each dropped token joins the kept token whose key has the largest cosine with its own.

    A kept key becomes the mean of itself and what joined it; its value likewise, with the same
    assignment. Source: LOOK-M, arXiv 2406.18139.

    Adaptation notes: every dropped token is used in every mode (released: "avg" and "weighted"
    leave out the less similar ones, by an average over heads). Merging stays inside the prompt's
    full blocks. Keys are merged as rotated, at different positions, as in the released code.

    Options:
        merge_mode: what a token adds to the mean: "avg" itself, "pivot" its midpoint with the kept
            token, "weighted" itself times the cosine.
    """

    name: ClassVar[str] = "lookm"
    source: ClassVar[str] = "LOOK-M, arXiv 2406.18139"
    cost: ClassVar[str] = "2*L*Hkv*P*C*D"

    merge_mode: str = "pivot"

    def __post_init__(self) -> None:
        require_choice("merge_mode", self.merge_mode, ("pivot", "avg", "weighted"))

    def workspace(self, row: RowShape, num_slots: int) -> int:
        similarity = min(row.length, _SOURCES_AT_ONCE) * num_slots
        return 2 * row.keys + 12 * row.scores + 9 * num_slots * row.head_size + similarity

    def merge(self, ctx: MergeContext) -> tuple[torch.Tensor, torch.Tensor]:
        kept = kept_positions(ctx)
        num_slots = kept.shape[2]
        cosine, nearest = _most_similar(ctx.keys, kept)
        slot = nearest.masked_fill(~dropped(ctx), num_slots)
        count = add_up(torch.ones_like(cosine), slot, num_slots)

        def blend(rows: torch.Tensor) -> torch.Tensor:
            own = take(rows, kept)
            if self.merge_mode == "weighted":
                rows = rows * cosine[..., None]
            total = add_up(rows, slot, num_slots)
            if self.merge_mode == "pivot":
                total = (total + own * count[..., None]) / 2
            return mean_with_own(own, total, count)

        return blend(ctx.keys), blend(ctx.values)


def _most_similar(keys: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of each token with a kept one, and that one's slot (ties: the earliest).

    Args:
        keys: [R, Hkv, T, D].
        kept: [R, Hkv, K], T in unused entries.

    Returns:
        [R, Hkv, T] float32 and int64.
    """
    unit = F.normalize(keys, dim=-1)
    targets = take(unit, kept).transpose(2, 3)
    unused = (kept == keys.shape[2])[:, :, None]
    best = [
        torch.matmul(sources, targets).masked_fill_(unused, float("-inf")).max(3)
        for sources in unit.split(_SOURCES_AT_ONCE, dim=2)
    ]
    cosine, slot = (torch.cat(parts, dim=2) for parts in zip(*best, strict=True))
    return cosine, slot
