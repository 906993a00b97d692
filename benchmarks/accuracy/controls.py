# SPDX-License-Identifier: Apache-2.0
"""Scores that nobody should lose to."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import registry
from vllm_kvcompress.options import require_whole
from vllm_kvcompress.scoring import Need, Scorer, Scores, ScoringContext


@dataclass(frozen=True)
class Chance(Scorer):
    """Random tokens; the window stays, as with the methods that look at it."""

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "none"
    cost: ClassVar[str] = "none"
    needs: ClassVar[Need] = Need(0)

    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("seed", self.seed, 0)

    def score(self, ctx: ScoringContext) -> Scores:
        shape = (len(ctx.prompt_lens), ctx.prompts.num_kv_heads, len(ctx.positions))
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed))
        return Scores(base=drawn, final=drawn)


def register() -> None:
    """Make the controls known as methods, in this process."""
    registry.add(Chance.name, Chance)
