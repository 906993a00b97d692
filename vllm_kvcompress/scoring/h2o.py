# SPDX-License-Identifier: Apache-2.0
"""Heavy hitters: attention accumulated over the whole prompt."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vllm_kvcompress.options import require_bool, require_choice, require_range
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext


@dataclass(frozen=True)
class H2O(Scorer):
    """How much attention a token collected from all prompt tokens that see it.

    Source: H2O, arXiv 2306.14048.

    Adaptation notes: one shot after prefill (the original goes on evicting while it decodes); the
    query heads of a KV head share one kept set; sums are float32. ``text_prior`` is the
    selection of LOOK-M, arXiv 2406.18139.

    Options:
        variant: "sum", or "observed": divided by the number of tokens that see the token.
        recent_share: share of the kept tokens that are the most recent ones; 0: the window.
        text_prior: keep all text, let visual tokens compete for what is left of the budget.
        text_hard_cap: with text_prior, text that exceeds the budget competes as well; every text
            token ranks above every visual one.
    """

    name: ClassVar[str] = "h2o"
    source: ClassVar[str] = "H2O, arXiv 2306.14048"
    cost: ClassVar[str] = "2*L*Hq*P^2*D"
    needs: ClassVar[Need] = Need.KEY_ATTENTION_SUMS
    never_negative: ClassVar[bool] = True

    variant: str = "sum"
    recent_share: float = 0.0
    text_prior: bool = False
    text_hard_cap: bool = False

    def __post_init__(self) -> None:
        require_choice("variant", self.variant, ("sum", "observed"))
        require_range("recent_share", self.recent_share, 0, 1)
        require_bool("text_prior", self.text_prior)
        require_bool("text_hard_cap", self.text_hard_cap)
        if self.text_hard_cap:
            if not self.text_prior:
                raise ValueError("text_hard_cap limits text_prior: set text_prior too")
            object.__setattr__(self, "needs", self.needs | Need.SEGMENTS)  # shadows the class's

    @property
    def text_first(self) -> bool:
        return self.text_prior and not self.text_hard_cap

    @property
    def ranks_text_first(self) -> bool:
        return self.text_hard_cap

    def num_recent(self, window: int, kept: int) -> int:
        # exactly: floats make 28.999... of 0.29 * 100
        share = Fraction(str(self.recent_share))
        return math.floor(share * kept) if share else window

    def score(self, ctx: ScoringContext) -> Scores:
        assert ctx.key_attention_sum is not None, "h2o needs column sums"
        score = ctx.key_attention_sum
        if self.variant == "observed":
            score = score / (ctx.prompt_lens[:, None] - ctx.positions)[:, None]
        if self.text_hard_cap:
            assert ctx.segment is not None
            is_text = (ctx.segment < 0)[:, None]
            largest = score.masked_fill(~ctx.is_prompt[:, None], 0.0).amax(2, keepdim=True)
            score = score + largest * is_text
        return Scores(base=score, final=score)
