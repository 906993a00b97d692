# SPDX-License-Identifier: Apache-2.0
"""What the instruction tokens that matter most look at."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.options import require_choice, require_range
from vllm_kvcompress.scoring.base import LayerContext, Need, Scorer, Scores
from vllm_kvcompress.scoring.instruction import instruction_rows

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
    needs: ClassVar[Need] = Need.KEYS | Need.TEXT_QUERIES | Need.SEGMENTS
    visual_only: ClassVar[bool] = True

    elite: float = 0.9
    elite_scope: str = "head"

    def __post_init__(self) -> None:
        require_range("elite", self.elite, 0, 1)
        require_choice("elite_scope", self.elite_scope, ELITE_SCOPES)

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    def score(self, ctx: LayerContext) -> Scores:
        heads = visual_attention(ctx, self.elite, self.elite_scope)  # [N, Hq, T]
        group = heads.shape[1] // ctx.keys.shape[1]
        mean = heads.unflatten(1, (-1, group)).mean(2)
        return Scores(base=mean, final=mean)


def visual_attention(ctx: LayerContext, elite: float, elite_scope: str) -> torch.Tensor:
    """Mean attention of the elite on each visual token, by query head.

    Returns:
        [N, Hq, T] float32, 0 off the visual tokens.
    """
    assert ctx.segment is not None
    # [N, 1, T]; what looks visual past the prompt's end is not seen by any row
    visual = (ctx.segment >= 0)[:, None]
    chosen = _elite(ctx, elite, elite_scope)  # [N, Hq, T]
    unseen = ~(visual | chosen)[:, :, None]
    total = torch.zeros(chosen.shape, device=chosen.device)
    for rows in instruction_rows(ctx):
        position = rows.positions.clamp(min=0)[:, None].expand(-1, chosen.shape[1], -1)
        counts = chosen.gather(2, position) & rows.counts[:, None]  # [N, Hq, R]
        probs = rows.logits.masked_fill_(unseen, float("-inf")).softmax(3)
        total += probs.masked_fill_(~counts[..., None], 0.0).sum(2)
    return (total / chosen.sum(2, keepdim=True)).masked_fill(~visual, 0.0)


def _elite(ctx: LayerContext, elite: float, elite_scope: str) -> torch.Tensor:
    """Which positions are elite instruction tokens, [N, Hq, T] bool."""
    assert ctx.text_rows is not None
    [last] = instruction_rows(ctx, last_only=True)
    text = ctx.is_prompt & (ctx.positions >= (ctx.prompt_lens - ctx.text_rows)[:, None])
    logits = last.logits[:, :, 0].masked_fill(~text[:, None], float("-inf"))
    least = math.log(elite) if elite else -math.inf  # of log attention, which needs no softmax
    if elite_scope == "layer":
        mean = ctx.mean_over_heads(logits.softmax(2))
        logits = mean.log()[:, None].expand_as(logits)
    return (logits >= logits.amax(2, keepdim=True) + least) & text[:, None]
