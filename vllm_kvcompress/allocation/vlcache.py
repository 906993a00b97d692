# SPDX-License-Identifier: Apache-2.0
"""More tokens for layers whose instruction looks at many tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation.base import Allocator, BudgetRequest, Scope
from vllm_kvcompress.allocation.rounding import apportion
from vllm_kvcompress.options import require_range
from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class VLCache(Allocator):
    """Layer budgets in proportion to how dense the attention of the instruction is.

    An attention probability counts as zero below ``threshold`` times the largest of its row;
    density is the share of all others in the rows after the last visual token.
    Source: VL-Cache, arXiv 2410.23317.

    Adaptation notes: after the bounds of 1 % and 100 % of the prompt the total is restored to the
    token, by largest remainder, which the paper leaves open. At most the last 256 instruction
    tokens are looked at, and the observation window where a prompt has no image.

    Options:
        threshold: share of a row's largest probability below which attention is none.
    """

    name: ClassVar[str] = "vlcache"
    source: ClassVar[str] = "VL-Cache, arXiv 2410.23317"
    cost: ClassVar[str] = "2*L*Hq*I*P*D"
    scope: ClassVar[Scope] = Scope.MODEL
    needs: ClassVar[Need] = Need.KEYS | Need.INSTRUCTION_QUERIES

    threshold: float = 0.01

    def __post_init__(self) -> None:
        require_range("threshold", self.threshold, 0, 1)

    def observe(self, ctx: ScoringContext, scores: Scores) -> torch.Tensor:
        """Density of the layer's attention, [R] float64."""
        assert ctx.instruction_len is not None
        last, num = ctx.prompt_lens, ctx.instruction_len
        strong = kernels.strong_key_counts(
            ctx.queries, ctx.prompts, last, num, ctx.scale, ctx.softcap, self.threshold
        )
        seen = num * (2 * last - num + 1) // 2  # keys that all rows of the instruction see
        return ctx.mean_over_heads(strong.sum(2) / seen[:, None].double())

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        assert observed is not None
        length = request.prompt_lens
        total = (request.capacity + request.num_protected) * observed.shape[1]
        part = (observed / observed.sum(1, keepdim=True)).nan_to_num(1 / observed.shape[1])
        shares = torch.maximum(part * total[:, None], 0.01 * length[:, None].double())
        tokens = apportion(shares, total, (length // 100).clamp_min(1), length)
        return tokens[:, :, None]

    def workspace(self, row: RowShape) -> int:
        return row.num_queries * row.num_q_heads
