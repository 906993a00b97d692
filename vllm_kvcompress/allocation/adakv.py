# SPDX-License-Identifier: Apache-2.0
"""More tokens for heads that look far and wide, fewer for heads that look at one spot."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation.base import Allocator, BudgetRequest, Scope
from vllm_kvcompress.allocation.rounding import apportion
from vllm_kvcompress.options import require_bool, require_choice, require_range
from vllm_kvcompress.scoring.base import Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class AdaKV(Allocator):
    """Head budgets from one top-k over the concatenated scores of a layer's heads.

    A head gets as many tokens as it has among the Hkv * b best of the layer, blended with the floor
    alpha * b. Source: Ada-KV, arXiv 2407.11550, with the defaults of the multimodal forks.

    Adaptation notes: the layer's total is conserved to the token (``rounding="exact"``). Under
    tensor parallelism a layer's total is shared out among the KV heads of each rank, because a rank
    cannot lend its memory to another.

    Options:
        alpha: share of the nominal budget that every head gets for sure.
        normalize: first scale each head by the share of its mass that its own top b holds.
        rounding: "exact", or "official" for the released integers. What these lose of the layer's
            total, up to a token per head, is not lost here: the heads share out the pages of the
            nominal budget in proportion, at any block size.
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV, arXiv 2407.11550"
    cost: ClassVar[str] = "L sorts of Hkv*P scores"
    scope: ClassVar[Scope] = Scope.LAYER
    per_layer: ClassVar[bool] = False

    alpha: float = 0.2
    normalize: bool = True
    rounding: str = "exact"

    def __post_init__(self) -> None:
        require_range("alpha", self.alpha, 0, 1)
        require_bool("normalize", self.normalize)
        require_choice("rounding", self.rounding, ("exact", "official"))

    def observe(self, ctx: ScoringContext, scores: Scores) -> torch.Tensor:
        """Entries of each head among the layer's Hkv * b best, [R, Hkv] int64."""
        return kernels.head_counts(scores.base, ctx.capacity.clamp_min(1), self.normalize)

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        assert observed is not None
        num, num_layers, num_heads = observed.shape
        capacity = request.capacity.repeat_interleave(num_layers)
        candidates = request.num_candidates.repeat_interleave(num_layers)
        shares = observed.flatten(0, 1).double() * (1 - self.alpha)
        if self.rounding == "official":
            floor = (capacity * self.alpha).long()
            tokens = torch.minimum((shares + floor[:, None]).round().long(), candidates[:, None])
        else:
            shares = shares + capacity[:, None] * self.alpha
            least = torch.zeros_like(candidates)
            tokens = apportion(shares, capacity * num_heads, least, candidates)
        return tokens.view(num, num_layers, num_heads) + request.num_protected[:, None, None]

    def workspace(self, row: RowShape) -> int:
        return row.scores
