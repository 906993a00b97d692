# SPDX-License-Identifier: Apache-2.0
"""Attention that Gaussian queries of the coming tokens would pay."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels.reference_paged import KEYS_AT_ONCE
from vllm_kvcompress.options import require_bool, require_range, require_whole
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape

_OFFSETS_AT_ONCE = 64


@dataclass(frozen=True)
class Expected(Scorer):
    """Closed-form attention of Gaussian queries at the next positions, times the value norm.

    Mean and covariance are those of the prompt's queries before RoPE; the rotation is averaged over
    the next positions. Source: Expected Attention, arXiv 2510.00636.

    Adaptation notes: the next positions follow the largest RoPE position of the prompt (the
    released code counts tokens, which differs under M-RoPE); the last token is always kept; a soft
    cap of the model has no closed form and is left out; sinks count 0 towards head budgets.

    Options:
        horizon: how many positions the rotation is averaged over.
        sinks: how many of the first tokens are kept, and left out of all statistics.
        covariance: use the covariance besides the mean.
        vnorm: weight by the norm of the value.
        epsilon: added to the attention before that.
    """

    name: ClassVar[str] = "expected"
    source: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    cost: ClassVar[str] = "2*L*Hq*P*D^2 while prefilling, as much again at the end"
    needs: ClassVar[Need] = Need.KEYS | Need.VALUES | Need.QUERY_MOMENTS
    never_negative: ClassVar[bool] = True

    horizon: int = 512
    sinks: int = 4
    covariance: bool = True
    vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        require_whole("horizon", self.horizon, 1)
        require_whole("sinks", self.sinks, 0)
        require_bool("covariance", self.covariance)
        require_bool("vnorm", self.vnorm)
        require_range("epsilon", self.epsilon, 0, 1e6)

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    @property
    def lookahead(self) -> int:
        return self.horizon

    def stats_from(self, prompt_len: int) -> int:
        return min(self.sinks, prompt_len - 1)

    def workspace(self, row: RowShape) -> int:
        queries = row.num_q_heads * row.head_size
        covariance = 10 * queries * row.head_size
        pieces = 2 * queries * min(row.length, KEYS_AT_ONCE)
        rotated = 6 * _OFFSETS_AT_ONCE * row.head_size**2
        return 3 * row.keys + 6 * row.logits + covariance + pieces + rotated

    def score(self, ctx: ScoringContext) -> Scores:
        is_sink = ctx.positions < self.sinks
        outside = is_sink | ~ctx.is_prompt  # [R, T]
        logits = self._logits(ctx).masked_fill(outside[:, None, None], float("-inf"))
        score = logits.softmax(-1).mean(2)  # [R, Hkv, T]
        if self.vnorm:
            score = (score + self.epsilon) * ctx.values.norm(dim=-1)
        base = score.masked_fill(is_sink, 0.0)
        return Scores(base=base, final=score.masked_fill(is_sink, float("inf")))

    def _logits(self, ctx: ScoringContext) -> torch.Tensor:
        """Log of the expected exponential of the logits, [R, Hkv, G, T] float32."""
        assert ctx.moments is not None, "expected needs query moments"
        num_kv_heads = ctx.prompts.num_kv_heads
        turn = self._mean_rotation(ctx)[:, None]  # [R, 1, D, D], row j: the image of unit vector j
        count = ctx.moments.num_tokens.clamp_min(1)[:, None, None]
        mean = ctx.moments.total / count  # [R, Hq, D]
        turned = torch.matmul(mean[:, :, None], turn)[:, :, 0]
        if not self.covariance:
            grouped = turned.unflatten(1, (num_kv_heads, -1))
            return ctx.scale[:, None, None, None] * torch.matmul(grouped, ctx.keys.transpose(2, 3))
        # float64: the difference of two large numbers
        centre = mean.double()
        spread = ctx.moments.outer.double() / count[..., None]
        spread = (spread - centre[..., None] * centre[:, :, None]).float()
        spread = torch.matmul(torch.matmul(turn.transpose(2, 3), spread), turn)
        logits = kernels.gaussian_logits(turned, spread, ctx.prompts, ctx.scale)
        return logits.unflatten(1, (num_kv_heads, -1))

    def _mean_rotation(self, ctx: ScoringContext) -> torch.Tensor:
        """RoPE averaged over the horizon, as the images [R, D, D] of the unit vectors.

        Computed once per prompt where all layers rotate alike; some models rotate local and global
        layers differently.
        """
        assert ctx.projector is not None, "expected needs the layers' RoPE"
        layers = ctx.stack[:1] if ctx.projector.shares_rotation(ctx.stack) else ctx.stack
        num, head_size = len(layers) * ctx.num_prompts, ctx.prompts.layout.head_size
        unit = torch.eye(head_size, device=ctx.keys.device).expand(num, 1, -1, -1)
        total = torch.zeros_like(unit[:, 0])
        for start in range(1, self.horizon + 1, _OFFSETS_AT_ONCE):
            stop = min(start + _OFFSETS_AT_ONCE, self.horizon + 1)
            offsets = torch.arange(start, stop, device=unit.device)
            units = unit.expand(-1, stop - start, -1, -1)
            total = total + ctx.projector.rotate(layers, units, offsets).sum(1)
        return (total / self.horizon).repeat(len(ctx.stack) // len(layers), 1, 1)
