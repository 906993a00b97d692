# SPDX-License-Identifier: Apache-2.0
"""Heavy hitters of a layer, shared by its heads."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.options import require_whole
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext


@dataclass(frozen=True)
class Elastic(Scorer):
    """How much attention a token collected from all prompt tokens, mean over all heads of a layer.

    All heads of a layer keep the same tokens. Source: Elastic Cache, arXiv 2407.18121.

    Adaptation notes: tokens are ranked by their score (the released code takes an argsort for ranks
    and forgets the offset of the sinks); decoded tokens never push others out; merging dropped
    tokens into kept ones is a merge of its own.

    Options:
        sinks: how many of the first tokens are kept.
    """

    name: ClassVar[str] = "elastic"
    source: ClassVar[str] = "Elastic Cache, arXiv 2407.18121"
    cost: ClassVar[str] = "as h2o"
    needs: ClassVar[Need] = Need.KEY_ATTENTION_SUMS
    never_negative: ClassVar[bool] = True
    shared_sets: ClassVar[bool] = True
    countable: ClassVar[bool] = False

    sinks: int = 1

    def __post_init__(self) -> None:
        require_whole("sinks", self.sinks, 0)

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    def score(self, ctx: ScoringContext) -> Scores:
        assert ctx.key_attention_sum is not None, f"{self.name} needs column sums"
        collected = ctx.mean_over_heads(ctx.key_attention_sum)[:, None]  # [R, 1, T]
        final = collected.masked_fill(ctx.positions < self.sinks, float("inf"))
        shape = ctx.key_attention_sum.shape
        return Scores(base=collected.expand(shape), final=final.expand(shape))
