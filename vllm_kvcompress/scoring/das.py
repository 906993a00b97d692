# SPDX-License-Identifier: Apache-2.0
"""Later images get what earlier ones got."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from vllm_kvcompress.options import require_choice, require_range
from vllm_kvcompress.scoring.base import SCORERS, Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.workspace import RowShape


def bases() -> dict[str, type[Scorer]]:
    """Scores that can be raised, by name."""
    return {name: scorer for name, scorer in SCORERS.items() if scorer.never_negative}


@dataclass(frozen=True)
class DAS(Scorer):
    """Another score, raised for images whose mean falls behind the mean of the images before them.

    Dynamic attention subsidy: no image is taxed, and the ranking inside an image does not change.
    Source: Myopia Rectification, CVPR 2026 Findings.

    Adaptation notes: a reconstruction. The publication says that attention under-serves later
    images and that scores are subsidised dynamically; formula and constants are ours. Budgets are
    counted on the wrapped score.

    Options:
        base, base_options: the score that is raised.
        eta, kmax: strength, 0 changes nothing, and largest factor.
        reference: mean that an image is raised to, "running" (up to and with this image) or
            "global" (of all images, whatever their order).
    """

    name: ClassVar[str] = "das"
    source: ClassVar[str] = "Myopia Rectification, CVPR 2026 Findings"
    cost: ClassVar[str] = "as its base, plus L*Hkv*P"
    needs: ClassVar[Need] = SnapKV.needs | Need.SEGMENTS  # an instance: those of its base
    reconstruction: ClassVar[bool] = True
    visual_only: ClassVar[bool] = True

    base: str = "snapkv"
    base_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    eta: float = 1.0
    kmax: float = 8.0
    reference: str = "running"

    def __post_init__(self) -> None:
        require_choice("base", self.base, tuple(bases()))
        if not isinstance(self.base_options, Mapping):
            raise ValueError(f"base_options must be a mapping, got {self.base_options!r}")
        for name, low in (("eta", 0), ("kmax", 1)):
            require_range(name, getattr(self, name), low, 1e6)
        require_choice("reference", self.reference, ("running", "global"))
        # shadow the class's: what holds for the base holds for the whole
        object.__setattr__(self, "needs", self.scorer.needs | Need.SEGMENTS)
        for name in ("shared_sets", "countable", "recent_fraction"):
            object.__setattr__(self, name, getattr(self.scorer, name))

    @cached_property
    def scorer(self) -> Scorer:
        return bases()[self.base](**self.base_options)

    @property
    def lookahead(self) -> int:
        return self.scorer.lookahead

    def num_recent(self, window: int, kept: int) -> int:
        return self.scorer.num_recent(window, kept)

    def stats_from(self, prompt_len: int) -> int:
        return self.scorer.stats_from(prompt_len)

    def kept_for_good(self, hidden_size: int) -> int:
        return self.scorer.kept_for_good(hidden_size)

    def workspace(self, row: RowShape) -> int:
        return self.scorer.workspace(row) + 14 * row.scores

    def score(self, ctx: ScoringContext) -> Scores:
        base, final = self.scorer.score(ctx)
        if ctx.num_segments < 2:
            return Scores(base, final)
        assert ctx.segment is not None
        assert ctx.num_recent is not None
        end = ctx.prompt_lens - ctx.num_recent
        scored = (ctx.segment >= 0) & (ctx.positions < end[:, None])
        bin_of = ctx.segment.masked_fill(~scored, ctx.num_segments)  # the last bin: nobody's
        factor = self._factors(final, scored, bin_of, ctx.num_segments)
        factor = torch.nn.functional.pad(1 + self.eta * (factor - 1), (0, 1), value=1.0)
        return Scores(base, final * factor.gather(2, bin_of[:, None].expand_as(final)))

    def _factors(
        self, scores: torch.Tensor, scored: torch.Tensor, bin_of: torch.Tensor, num_bins: int
    ) -> torch.Tensor:
        """Factor of every segment, [R, Hkv, M] float32 in [1, kmax].

        Segments stand one after another, so the running sum at a segment's last token is what the
        images up to it have received. An infinite score (a sink) tells nothing of its image.
        """
        counted = scored[:, None] & scores.isfinite()
        sums = scores.double().masked_fill(~counted, 0.0).cumsum(2)
        counts = counted.cumsum(2)
        end = torch.zeros(len(bin_of), num_bins + 1, dtype=torch.int64, device=bin_of.device)
        after = torch.arange(1, bin_of.shape[1] + 1, device=bin_of.device).expand_as(bin_of)
        end = end.scatter_reduce(1, bin_of, after, "amax")[:, :-1].cummax(1).values  # [R, M]
        index = end[:, None].expand(-1, scores.shape[1], -1)
        pad = torch.nn.functional.pad
        received = pad(sums, (1, 0)).gather(2, index)  # [R, Hkv, M]
        holders = pad(counts, (1, 0)).gather(2, index)
        own = received - pad(received[..., :-1], (1, 0))
        own_mean = own / (holders - pad(holders[..., :-1], (1, 0))).clamp_min(1)
        reference = received / holders.clamp_min(1)
        if self.reference == "global":
            reference = reference[..., -1:]
        return (reference / own_mean.clamp_min(1e-12)).clamp(1, self.kmax).float()
