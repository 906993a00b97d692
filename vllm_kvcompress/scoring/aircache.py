# SPDX-License-Identifier: Apache-2.0
"""What the instruction tokens that matter most look at."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.options import require_choice, require_range
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape

ELITE_SCOPES = ("head", "layer")


@dataclass(frozen=True)
class AirCache(Scorer):
    """How much the elite of the instruction looks at each visual token.

    The elite are the instruction tokens that the last token looks at almost as much as at its
    favourite. Their rows are softmaxed over the visual tokens and the elite alone, then averaged
    over the elite and over the query heads of a KV head. Source: AirCache, arXiv 2503.23956.

    Adaptation notes: no code was published. Each query head chooses its own elite unless told
    otherwise; rows do not see later instruction tokens; at most the last 256 instruction tokens are
    considered. A prompt that ends with an image is scored by its last token, which counts once.

    Options:
        elite: share of the favourite's attention that makes a token elite.
        elite_scope: "head", or "layer" for one elite by the mean over all query heads.
    """

    name: ClassVar[str] = "aircache"
    source: ClassVar[str] = "AirCache, arXiv 2503.23956"
    cost: ClassVar[str] = "2*L*Hq*I*P*D"
    needs: ClassVar[Need] = Need.KEYS | Need.INSTRUCTION_QUERIES | Need.SEGMENTS
    visual_only: ClassVar[bool] = True
    scores_text: ClassVar[bool] = False

    elite: float = 0.9
    elite_scope: str = "head"

    def __post_init__(self) -> None:
        require_range("elite", self.elite, 0, 1)
        require_choice("elite_scope", self.elite_scope, ELITE_SCOPES)

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    def workspace(self, row: RowShape) -> int:
        return 3 * row.num_queries * row.num_q_heads + row.logits + 3 * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        heads = visual_attention(ctx, self.elite, self.elite_scope)  # [R, Hq, T]
        mean = heads.unflatten(1, (ctx.prompts.num_kv_heads, -1)).mean(2)
        return Scores(base=mean, final=mean)


def visual_attention(ctx: ScoringContext, elite: float, elite_scope: str) -> torch.Tensor:
    """Mean attention of the elite on each visual token, by query head.

    Returns:
        [R, Hq, T] float32, 0 off the visual tokens.
    """

    def attend() -> torch.Tensor:
        assert ctx.segment is not None
        chosen = _elite(ctx, elite, elite_scope)
        return kernels.elite_attention(
            ctx.queries, chosen, ctx.segment, ctx.prompts, ctx.prompt_lens, ctx.scale, ctx.softcap
        )

    return ctx.shared((visual_attention, elite, elite_scope), attend)


def _elite(ctx: ScoringContext, elite: float, elite_scope: str) -> torch.Tensor:
    """Which of the last rows are elite, [R, Hq, Q] bool."""
    assert ctx.instruction_len is not None
    logits = kernels.last_row_logits(
        ctx.queries, ctx.prompts, ctx.prompt_lens, ctx.instruction_len, ctx.scale, ctx.softcap
    )
    text = logits > float("-inf")
    least = math.log(elite) if elite else -math.inf  # of log attention, which needs no softmax
    if elite_scope == "layer":
        mean = ctx.mean_over_heads(logits.softmax(2))
        logits = mean.log()[:, None].expand_as(logits)
    return (logits >= logits.amax(2, keepdim=True) + least) & text
