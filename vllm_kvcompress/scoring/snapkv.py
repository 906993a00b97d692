# SPDX-License-Identifier: Apache-2.0
"""Observation-window attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels.reference import row_logits
from vllm_kvcompress.options import require_bool, require_choice, require_odd
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.scoring.window_options import columns_of, needs_of, output_weight
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class SnapKV(Scorer):
    """How much the last W prompt queries look at each earlier token.

    Softmax over all visible keys, mean over window rows and over the query heads of a KV head, then
    pooling over neighbouring positions. Source: SnapKV, arXiv 2404.14469.

    Adaptation notes: the query heads of a KV head share one kept set (the original keeps one per
    query head); the window mean is divided by W (the original sums: same ranking); arithmetic is
    float32, while released code rounds scores to the model's type, which makes many of them equal.

    Options:
        kernel: odd pooling width in tokens.
        pool: "avg" (zeros outside the prefix count) or "max".
        reduction: over the query heads of a group, "mean" or "max".
        grid: pool an image, or a frame, along its rows or along its columns, whichever the window's
            attention runs along in a layer; along the prompt where its grid is not known.
        clamp: raise what is below the mean over the prompt to the mean.
        weight: "none", or "output": multiply by the norm of what a token's value adds to the
            layer's output, mean over the query heads of a group.
        score_dtype: "float32", or "model" to round where released code does, for comparisons with
            it: products, logits, probabilities, their means and pooled scores, to the type of the
            queries; not fused, and without grid, clamp and weight, which no such code has.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    cost: ClassVar[str] = "2*L*Hq*W*P*D"
    needs: ClassVar[Need] = Need.KEYS | Need.WINDOW_QUERIES
    never_negative: ClassVar[bool] = True

    kernel: int = 5
    pool: str = "avg"
    reduction: str = "mean"
    score_dtype: str = "float32"
    grid: bool = False
    clamp: bool = False
    weight: str = "none"

    def __post_init__(self) -> None:
        require_odd("kernel", self.kernel)
        require_choice("pool", self.pool, ("avg", "max"))
        require_choice("reduction", self.reduction, ("mean", "max"))
        require_choice("score_dtype", self.score_dtype, ("float32", "model"))
        require_bool("grid", self.grid)
        require_bool("clamp", self.clamp)
        require_choice("weight", self.weight, ("none", "output"))
        if self.score_dtype == "model" and (self.grid or self.raises):
            raise ValueError('score_dtype "model" goes without grid, clamp and weight')
        needs = self._needs_without_options() | needs_of(self.grid, self.weight)
        object.__setattr__(self, "needs", needs)  # shadows the class's

    @classmethod
    def _needs_without_options(cls) -> Need:
        return cls.needs

    @property
    def raises(self) -> bool:
        """Whether pooled scores are raised or weighed."""
        return self.clamp or self.weight != "none"

    def workspace(self, row: RowShape) -> int:
        if self.score_dtype == "model":
            return 2 * row.keys + 3 * row.num_queries * row.logits
        return (4 + self.raises) * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        base = self.importance(ctx)
        return Scores(base=base, final=base)

    def importance(self, ctx: ScoringContext) -> torch.Tensor:
        """Pooled window mean, [R, Hkv, T] float32, 0 at t >= n."""
        mean, _ = self.window_scores(ctx)
        pooled = kernels.pool_prefix(
            mean, ctx.num_candidates, self.kernel, self.pool, self.columns(ctx, mean)
        )
        if self.raises:
            pooled, _ = self.raised(ctx, pooled)
        return self.rounded(pooled, ctx.queries.dtype)

    def columns(self, ctx: ScoringContext, mean: torch.Tensor) -> kernels.Grids | None:
        return columns_of(ctx, mean) if self.grid else None

    def raised(
        self, ctx: ScoringContext, base: torch.Tensor, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pooled window mean after clamp and weight, and pooled last row of the same mass."""
        weight = output_weight(ctx) if self.weight == "output" else None
        return kernels.weigh_scores(base, ctx.num_candidates, weight, last, clamp=self.clamp)

    def window_scores(self, ctx: ScoringContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Window mean and last row before pooling, each [R, Hkv, T] float32, 0 at t >= n."""
        if self.score_dtype == "model":
            return self._rounded_window_scores(ctx)
        return kernels.window_scores(
            ctx.window_queries, ctx.prompts, ctx.prompt_lens, ctx.scale, ctx.softcap, self.reduction
        )

    def rounded(self, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``scores`` in the precision of ``score_dtype``, as float32."""
        return scores if self.score_dtype == "float32" else scores.to(dtype).float()

    def _rounded_window_scores(self, ctx: ScoringContext) -> tuple[torch.Tensor, torch.Tensor]:
        window_pos = ctx.num_candidates[:, None] + ctx.positions[: ctx.window]
        dtype = ctx.queries.dtype
        one = torch.ones_like(ctx.scale)
        products = row_logits(ctx.window_queries, ctx.keys, window_pos, one).to(dtype)
        logits = (products * ctx.scale[:, None, None, None, None]).to(dtype)
        if ctx.softcap:
            logits = torch.tanh(logits / ctx.softcap) * ctx.softcap
        probs = logits.softmax(-1, dtype=torch.float32).to(dtype)
        by_query_head = torch.stack([probs.mean(3), probs[:, :, :, -1]])  # [2, N, Hkv, G, T]
        take = torch.amax if self.reduction == "max" else torch.mean
        scores = take(by_query_head, dim=3).float()
        scores.masked_fill_((ctx.positions >= ctx.num_candidates[:, None])[:, None], 0.0)
        return scores[0], scores[1]
