# SPDX-License-Identifier: Apache-2.0
"""More tokens for layers that look at images a lot, and at few of their tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation.base import Allocator, BudgetRequest, Scope
from vllm_kvcompress.allocation.rounding import apportion
from vllm_kvcompress.options import require_choice, require_range
from vllm_kvcompress.scoring.aircache import ELITE_SCOPES, visual_attention
from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class AirCacheLayers(Allocator):
    """Layer budgets from strength and skewness of the attention on visual tokens.

    Strength is the sum of what the elite of the instruction pays to the visual tokens, skewness
    that of its distribution over them; each is divided by its mean over the layers, and the two are
    averaged. Source: AirCache, arXiv 2503.23956.

    Adaptation notes: no code was published. Normalisation by the layer mean is our proposal, made
    so that the mean budget stays; negative skewness counts as none; heads are averaged first.
    Prompts with fewer than 3 visual tokens are budgeted evenly.

    Options:
        elite, elite_scope: as those of the scorer aircache.
        statistic: "both", or "strength" or "skewness" alone.
    """

    name: ClassVar[str] = "aircache"
    source: ClassVar[str] = "AirCache, arXiv 2503.23956"
    cost: ClassVar[str] = "2*L*Hq*I*P*D"
    scope: ClassVar[Scope] = Scope.MODEL
    needs: ClassVar[Need] = Need.KEYS | Need.INSTRUCTION_QUERIES | Need.SEGMENTS
    reconstruction: ClassVar[bool] = True

    elite: float = 0.9
    elite_scope: str = "head"
    statistic: str = "both"

    def __post_init__(self) -> None:
        require_range("elite", self.elite, 0, 1)
        require_choice("elite_scope", self.elite_scope, ELITE_SCOPES)
        require_choice("statistic", self.statistic, ("both", "strength", "skewness"))

    def observe(self, ctx: ScoringContext, scores: Scores) -> torch.Tensor:
        """Strength and skewness, [R, 2] float64."""
        assert ctx.segment is not None
        heads = visual_attention(ctx, self.elite, self.elite_scope)
        mean = ctx.mean_over_heads(heads)
        return kernels.strength_and_skewness(mean, ctx.segment, ctx.prompt_lens)

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        assert observed is not None
        num_layers = observed.shape[1]
        measured = observed.nan_to_num(0.0)  # [N, L, 2]
        mean = measured.mean(1, keepdim=True)
        strength, skewness = torch.where(mean > 0, measured / mean, 1.0).unbind(2)
        # no layer is skewed: strength alone decides
        skewness = torch.where(mean[..., 1] > 0, skewness, strength)
        share = {
            "both": (strength + skewness) / 2,
            "strength": strength,
            "skewness": skewness,
        }[self.statistic]
        counts = apportion(
            share * request.capacity[:, None],
            request.capacity * num_layers,
            torch.ones_like(request.num_candidates),
            request.num_candidates,
        )
        return (counts + request.num_protected[:, None])[:, :, None]

    def workspace(self, row: RowShape) -> int:
        return 3 * row.num_queries * row.num_q_heads + row.logits + 12 * row.length
