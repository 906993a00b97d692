# SPDX-License-Identifier: Apache-2.0
"""Observation-window attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.scoring.base import LayerContext, Need, Scorer, Scores


@dataclass(frozen=True)
class SnapKV(Scorer):
    """How much the last W prompt queries look at each earlier token.

    Softmax over all visible keys, mean over window rows and over the query heads of a KV head, then
    pooling over neighbouring positions. Source: SnapKV, arXiv 2404.14469.

    Adaptation notes: the query heads of a KV head share one kept set (the original keeps one per
    query head); the window mean is divided by W (the original sums: same ranking); arithmetic is
    float32.

    Options:
        kernel: odd pooling width in tokens.
        pool: "avg" (zeros outside the prefix count) or "max".
        reduction: over the query heads of a group, "mean" or "max".
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    needs: ClassVar[Need] = Need.KEYS | Need.WINDOW_QUERIES

    kernel: int = 5
    pool: str = "avg"
    reduction: str = "mean"

    def __post_init__(self) -> None:
        require_odd("kernel", self.kernel)
        require_choice("pool", self.pool, ("avg", "max"))
        require_choice("reduction", self.reduction, ("mean", "max"))

    def score(self, ctx: LayerContext) -> Scores:
        base, _ = self.window_and_last(ctx)
        base = mask_prefix(base, ctx.num_scored)
        return Scores(base=base, final=base)

    def window_and_last(self, ctx: LayerContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled window mean and pooled last row, each [N, Hkv, T] float32, 0 at t >= n."""
        mean, last = kernels.window_scores(
            ctx.window_queries, ctx.prompts, ctx.prompt_lens, ctx.scale, ctx.softcap, self.reduction
        )
        num_scored = ctx.num_scored
        return (
            kernels.pool_prefix(mean, num_scored, self.kernel, self.pool),
            kernels.pool_prefix(last, num_scored, self.kernel, self.pool),
        )


def mask_prefix(scores: torch.Tensor, num_scored: torch.Tensor) -> torch.Tensor:
    """-inf at t >= n. ``scores`` [N, Hkv, T], ``num_scored`` [N]."""
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(positions >= num_scored[:, None, None], float("-inf"))


def require_odd(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be an odd whole number >= 1, got {value!r}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def require_range(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")
