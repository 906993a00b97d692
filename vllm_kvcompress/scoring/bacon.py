# SPDX-License-Identifier: Apache-2.0
"""Boundary attention calibration."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.options import require_choice, require_odd, require_range, require_whole
from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.workspace import RowShape


@dataclass(frozen=True)
class Bacon(SnapKV):
    """Window attention, calibrated by what the very last prompt query sees more of.

    Evidence E = max(last row - window mean, 0) is trusted more where neighbours agree (coherence)
    and where previous layers agree (persistence), scaled to the spread of the window score, and
    added.
    Source: BACON, arXiv 2606.14782 and its released code.

    Adaptation notes: the evidence that layers leave for later ones belongs to one prompt, never to
    the process; arithmetic is float32; a layer's capacity is the nominal budget - W, not the
    head's.

    Options, besides those of snapkv:
        mode: "e" (evidence), "el" (+ coherence), "elt" (+ persistence, gated), "rel" (attenuated).
        local_k: odd width of the coherence pooling.
        trace_r: how many previous layers persistence looks at; 0 turns it off.
        lambda_c: strength of the calibration.
        topk_frac: statistics are taken over the topk_frac * capacity largest scores.
        trace_reduce: "head" looks back at the same KV head of previous layers, as the released code
            does, although heads of two layers are unrelated; "head_mean" at the mean of all heads.
    """

    name: ClassVar[str] = "bacon"
    source: ClassVar[str] = "BACON, arXiv 2606.14782"
    cost: ClassVar[str] = "as snapkv, plus L*Hkv*P*(local_k + trace_r) and two sorts"
    needs: ClassVar[Need] = SnapKV.needs | Need.LAYER_TRACE

    mode: str = "elt"
    local_k: int = 5
    trace_r: int = 4
    lambda_c: float = 0.5
    topk_frac: float = 2.0
    trace_reduce: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mode", self.mode, ("e", "el", "elt", "rel"))
        require_odd("local_k", self.local_k)
        require_whole("trace_r", self.trace_r, 0)
        require_range("lambda_c", self.lambda_c, 0, 1e6)
        require_range("topk_frac", self.topk_frac, 0, 1e6)
        require_choice("trace_reduce", self.trace_reduce, ("head", "head_mean"))

    def workspace(self, row: RowShape) -> int:
        return super().workspace(row) + 5 * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        base, evidence, columns = self.boundary(ctx, *self.window_scores(ctx))
        left = self.left_behind(ctx, evidence).contiguous()
        final = kernels.bacon_calibrate(
            base,
            evidence,
            ctx.trace.extend(left.unflatten(0, (-1, ctx.num_prompts)), self.trace_r),
            ctx.num_candidates,
            ctx.capacity,
            columns,
            trace_r=self.trace_r,
            mode=self.mode,
            local_k=self.local_k,
            lambda_c=self.lambda_c,
            topk_frac=self.topk_frac,
        )
        return Scores(base, self.rounded(final, ctx.queries.dtype))

    def boundary(
        self, ctx: ScoringContext, mean: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, kernels.Grids | None]:
        """B and E, each [R, Hkv, T], and the images that are pooled along their columns.

        Args:
            mean, last: of :meth:`window_scores`.
        """
        kernel, columns = self.kernel, self.columns(ctx, mean)
        if self.score_dtype == "model" or self.grid or self.raises:
            mean, last = (
                self.rounded(
                    kernels.pool_prefix(row, ctx.num_candidates, kernel, self.pool, columns),
                    ctx.queries.dtype,
                )
                for row in (mean, last)
            )
            kernel = 1
        if self.raises:
            mean, weighed = self.raised(ctx, mean, last)
            assert weighed is not None
            last = weighed
        base, evidence = kernels.bacon_evidence(
            mean, last, ctx.num_candidates, kernel=kernel, pool=self.pool
        )
        return base, evidence, columns

    def left_behind(self, ctx: ScoringContext, evidence: torch.Tensor) -> torch.Tensor:
        """What later layers see of a layer's E, [R, Hkv, T]."""
        if self.trace_reduce == "head":
            return evidence
        return ctx.mean_over_heads(evidence)[:, None].expand_as(evidence)
