# SPDX-License-Identifier: Apache-2.0
"""Attention sinks and the most recent tokens."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.options import require_whole
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext


@dataclass(frozen=True)
class Streaming(Scorer):
    """The first tokens of the prompt, then the later the better; keys and queries play no part.

    Source: StreamingLLM, arXiv 2309.17453.

    Adaptation notes: kept tokens keep their positions (the original numbers them anew inside its
    cache); decoded tokens never push others out.

    Options:
        sinks: how many of the first tokens are kept.
    """

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "none"
    needs: ClassVar[Need] = Need(0)
    weighs: ClassVar[bool] = False
    countable: ClassVar[bool] = False

    sinks: int = 4

    def __post_init__(self) -> None:
        require_whole("sinks", self.sinks, 0)

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    def score(self, ctx: ScoringContext) -> Scores:
        shape = (len(ctx.prompt_lens), ctx.prompts.num_kv_heads, len(ctx.positions))
        later = ctx.positions.float()
        final = later.masked_fill(ctx.positions < self.sinks, float("inf"))
        return Scores(base=later.expand(shape), final=final.expand(shape))
