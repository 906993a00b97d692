# SPDX-License-Identifier: Apache-2.0
"""What the instruction looks at."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress import kernels
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


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
    needs: ClassVar[Need] = Need.KEYS | Need.INSTRUCTION_QUERIES
    never_negative: ClassVar[bool] = True
    recent_fraction: ClassVar[float] = 0.1

    def num_recent(self, window: int, kept: int) -> int:
        return 1  # of every head; the others follow from what the head keeps

    def workspace(self, row: RowShape) -> int:
        return row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        assert ctx.instruction_len is not None
        score = kernels.key_attention_sum(
            ctx.queries,
            ctx.instruction_len,
            ctx.prompt_lens - ctx.instruction_len,
            ctx.prompts,
            ctx.scale,
            ctx.softcap,
        )
        return Scores(base=score, final=score)
