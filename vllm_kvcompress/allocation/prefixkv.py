# SPDX-License-Identifier: Apache-2.0
"""Every layer keeps the tokens that cover the same share of its attention."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.allocation.base import Allocator, BudgetRequest, Scope
from vllm_kvcompress.allocation.profiles import load_forget_fractions
from vllm_kvcompress.allocation.rounding import apportion
from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class PrefixKV(Allocator):
    """Layer budgets from one level of accumulated attention that all layers reach.

    Tokens of a layer are ordered by the attention they received from the whole prompt; the layer
    keeps the shortest start of that order whose share of the sum reaches the level, and the level
    is the highest that the budget pays for. Source: PrefixKV, arXiv 2412.03409.

    Adaptation notes: the level is found exactly and per prompt, and what ties leave over goes to
    the layers whose next token has the largest share; the released search stops within 5 tokens and
    may not end. Layer shares measured offline, which the released evaluation uses, are an option,
    scaled to the budget.

    Options:
        profile: path of a JSON list with the share of tokens that each layer forgets.
    """

    name: ClassVar[str] = "prefixkv"
    source: ClassVar[str] = "PrefixKV, arXiv 2412.03409"
    cost: ClassVar[str] = "as h2o, once if the scorer sums as well; a sort of L*P sums"
    scope: ClassVar[Scope] = Scope.MODEL
    needs: ClassVar[Need] = Need.KEY_ATTENTION_SUMS

    profile: str | None = None

    def __post_init__(self) -> None:
        if self.profile is not None:
            if not isinstance(self.profile, str):
                raise ValueError(f"profile must be the path of a JSON file, got {self.profile!r}")
            load_forget_fractions(self.profile)

    def check_model(self, num_layers: int, num_query_heads: int) -> None:
        if self.profile is not None:
            found = len(load_forget_fractions(self.profile))
            if found != num_layers:
                raise ValueError(f"{self.profile} has {found} layers, the model has {num_layers}")

    def observe(self, ctx: ScoringContext, scores: Scores) -> torch.Tensor:
        """Attention that each token received, [R, T] float32, 0 at t >= P."""
        assert ctx.key_attention_sum is not None
        return ctx.mean_over_heads(ctx.key_attention_sum).masked_fill(~ctx.is_prompt, 0.0)

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        assert observed is not None
        total = (request.capacity + request.num_protected) * observed.shape[1]
        if self.profile is None:
            starts = shortest_starts(observed, total, request.prompt_lens)
            return starts[:, :, None]
        shares = _layer_shares(self.profile, total.device) * total[:, None]
        tokens = apportion(shares, total, torch.ones_like(total), request.prompt_lens)
        return tokens[:, :, None]

    def workspace(self, row: RowShape) -> int:
        return row.scores + 2 * row.length

    def decision_workspace(self, row: RowShape) -> int:
        return 24 * row.length


@functools.cache
def _layer_shares(path: str, device: torch.device) -> torch.Tensor:
    """Part of each layer in all kept tokens, [L] float64; copied to a device only once."""
    kept = 1 - torch.tensor(load_forget_fractions(path), dtype=torch.float64, device=device)
    return kept / kept.sum()


def shortest_starts(
    received: torch.Tensor, total: torch.Tensor, prompt_lens: torch.Tensor
) -> torch.Tensor:
    """Tokens per layer at the highest level that ``total`` pays for, [N, L] int64.

    A layer needs one token, and one more for each share of its tokens that is below the level. So
    among the shares of all layers the level is the one that ``total - L`` others are not above.

    Args:
        received: [N, L, T] float32, 0 at t >= P.
        total: [N] int64, at least L and at most L * P.
        prompt_lens: [N] int64, P.
    """
    num, num_layers, length = received.shape
    rank = torch.arange(length, device=received.device)
    ranked = received.double().sort(dim=2, descending=True).values
    mass = ranked.cumsum(2)
    share = (mass / mass[..., -1:]).nan_to_num(1.0)
    share = (share * 1e12).round()  # equal shares tie in spite of float noise
    share = share.masked_fill((rank >= prompt_lens[:, None])[:, None], float("inf"))
    in_order = share.view(num, -1).sort(1).values
    level = in_order.gather(1, (total - num_layers)[:, None])
    counts = 1 + (share < level[..., None]).sum(2)

    # equal shares reach the level together: what is left goes to single tokens
    left = total - counts.sum(1)
    open_ = (rank >= counts[..., None]) & (rank < prompt_lens[:, None])[:, None]
    gain = (ranked / mass[..., -1:]).nan_to_num(0.0).masked_fill(~open_, float("-inf"))
    order = gain.view(num, -1).argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(order.shape[1], device=order.device) < left[:, None]
    return counts.scatter_add_(1, order // length, taken.long())
