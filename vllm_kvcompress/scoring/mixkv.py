# SPDX-License-Identifier: Apache-2.0
"""Window attention mixed with how little a key resembles the others."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from vllm_kvcompress.options import require_choice
from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.scoring.redundancy import RatioTable
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.workspace import RowShape

_EPS = 1e-8


@dataclass(frozen=True)
class MixKV(SnapKV):
    """Importance (window attention, value norm) mixed with key diversity, head by head.

    A head whose keys are nearly parallel leans on diversity, S = r * diversity + (1 - r) *
    importance, where r is the mean cosine between two of its keys.
    Source: MixKV, arXiv 2510.20707 and its released code.

    Adaptation notes: r is computed from the prompt at hand, clamped to [0, 1] (the released code
    reads a table of one model instead, and r = 0 where the table ends); equal value norms give 0,
    not NaN; "knorm" runs what its name says; arithmetic is float32.

    Options, besides those of snapkv:
        diversity: "head" (weighted by r), "flat" (equal thirds), or one part alone: "attn" (window
            attention), "keydiff" (diversity), "vnorm" and "knorm" (attention plus that norm).
        ratio_table: JSON file of released r, {"layer-head-key": [numbers]}; heads that it lacks use
            their own r, and its "layer-head-value" entries are not used.
    """

    name: ClassVar[str] = "mixkv"
    source: ClassVar[str] = "MixKV, arXiv 2510.20707"
    cost: ClassVar[str] = "as snapkv, plus 4*L*Hkv*P*D and a read of V"
    needs: ClassVar[Need] = SnapKV.needs | Need.VALUES

    diversity: str = "head"
    ratio_table: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ("head", "flat", "attn", "keydiff", "vnorm", "knorm")
        require_choice("diversity", self.diversity, choices)
        if self.ratio_table is not None:
            self._table  # noqa: B018, a bad file is refused here and not while serving

    def workspace(self, row: RowShape) -> int:
        return super().workspace(row) + 5 * row.keys + 8 * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        base = self.importance(ctx)
        match self.diversity:
            case "attn":
                final = base
            case "vnorm":
                final = base + _as_large(ctx.values.norm(dim=-1), base, ctx.num_candidates)
            case "knorm":
                final = base + _as_large(-ctx.keys.norm(dim=-1), base, ctx.num_candidates)
            case _:
                final = self._mixed(ctx, base)
        return Scores(base, final)

    def _mixed(self, ctx: ScoringContext, base: torch.Tensor) -> torch.Tensor:
        unit = ctx.keys / ctx.keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        count = ctx.prompt_lens[:, None]
        mean = unit.sum(2) / count[:, :, None]  # [R, Hkv, D], the window included
        likeness = torch.matmul(unit, mean[:, :, :, None])[..., 0]
        diversity = _as_large(-likeness, base, ctx.num_candidates)
        if self.diversity == "keydiff":
            return diversity
        importance = base + _as_large(ctx.values.norm(dim=-1), base, ctx.num_candidates)
        if self.diversity == "flat":
            return 0.33 * (diversity + importance)
        ratio = (count * mean.square().sum(-1) - 1) / (count - 1)
        if self.ratio_table is not None:
            known = self._table.ratios(ctx.layers, ctx.first_head, ratio)
            ratio = torch.where(known.isnan(), ratio, known)
        ratio = ratio.clamp(0, 1)[:, :, None]
        return ratio * diversity + (1 - ratio) * importance

    @cached_property
    def _table(self) -> RatioTable:
        assert self.ratio_table is not None, "asked for without a file"
        return RatioTable(self.ratio_table)


def _as_large(
    values: torch.Tensor, base: torch.Tensor, num_candidates: torch.Tensor
) -> torch.Tensor:
    """``values`` brought to [0, 1] over the scored prefix, then to the mean of ``base``.

    All [R, Hkv, T]; 0 at t >= n. ``base`` is 0 there.
    """
    position = torch.arange(values.shape[2], device=values.device)
    outside = (position >= num_candidates[:, None])[:, None]
    low = values.masked_fill(outside, float("inf")).amin(2, keepdim=True)
    high = values.masked_fill(outside, float("-inf")).amax(2, keepdim=True)
    spread = ((values - low) / (high - low + _EPS)).masked_fill(outside, 0.0)
    count = num_candidates[:, None, None]
    level = base.sum(2, keepdim=True) / count
    return spread * level / (spread.sum(2, keepdim=True) / count + _EPS)
