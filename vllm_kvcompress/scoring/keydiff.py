# SPDX-License-Identifier: Apache-2.0
"""Keys that point away from the others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape

_EPS = 1e-12


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """How far a key points away from the mean direction of the head's keys; queries play no part.

    Source: KeyDiff, arXiv 2504.15364.

    Adaptation notes: one shot over the whole prompt (the original evicts block by block during
    prefill); the last token is always kept; budgets are counted on 1 + score, which is not
    negative.
    """

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364"
    cost: ClassVar[str] = "4*L*Hkv*P*D"
    needs: ClassVar[Need] = Need.KEYS
    weighs: ClassVar[bool] = False

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    def workspace(self, row: RowShape) -> int:
        return 3 * row.keys + 5 * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        unit = ctx.keys / ctx.keys.norm(dim=-1, keepdim=True).clamp_min(_EPS)
        anchor = unit.sum(2) / ctx.prompt_lens[:, None, None]  # [R, Hkv, D]
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp_min(_EPS)
        final = -torch.matmul(unit, anchor[:, :, :, None])[..., 0]
        return Scores(base=(1 + final).clamp_min(0), final=final)
