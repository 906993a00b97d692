# SPDX-License-Identifier: Apache-2.0
"""What the instruction looks at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.scoring.attention import attention
from vllm_kvcompress.scoring.base import LayerContext, Need, Scorer, Scores

_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class PostVision(Scorer):
    """Attention summed over the text after the last visual token; visual and text tokens compete.

    Source: VL-Cache, arXiv 2410.23317.

    Adaptation notes: a tenth of the tokens that a head keeps are its most recent ones (the source
    speaks of a recent window of 10 % of the budget); the mean over the query heads of a KV head; a
    prompt without visual tokens is judged by its window, one that ends with an image by its last
    token; arithmetic is float32.
    """

    name: ClassVar[str] = "postvision"
    source: ClassVar[str] = "VL-Cache, arXiv 2410.23317"
    cost: ClassVar[str] = "2*L*Hq*I*P*D"
    needs: ClassVar[Need] = Need.KEYS | Need.TEXT_QUERIES
    recent_fraction: ClassVar[float] = 0.1

    def num_recent(self, window: int, kept: int) -> int:
        return 1  # of every head; the others follow from what the head keeps

    def score(self, ctx: LayerContext) -> Scores:
        assert ctx.text_rows is not None, "postvision needs the instruction's rows"
        score = torch.zeros(ctx.keys.shape[:3], device=ctx.keys.device)
        num_rows = ctx.queries.shape[1]
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            queries = ctx.queries[:, start : start + _ROWS_AT_ONCE]
            from_end = num_rows - start - torch.arange(queries.shape[1], device=score.device)
            probs = attention(ctx, queries, ctx.prompt_lens[:, None] - from_end)
            foreign = from_end > ctx.text_rows[:, None]  # [N, M]
            probs = probs.masked_fill(foreign[:, None, None, :, None], 0.0)
            score += probs.sum(3).mean(2)
        return Scores(base=score, final=score)
