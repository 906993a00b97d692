# SPDX-License-Identifier: Apache-2.0
"""Small keys."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.options import require_range
from vllm_kvcompress.presets import Preset
from vllm_kvcompress.scoring import Need, Scorer, Scores, ScoringContext


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """How small the norm of a token's key is.

    Source: L2 norm, arXiv 2406.11430.

    Adaptation notes: the observation window is kept, as with snapkv.

    Options:
        power: of the norm.
    """

    name: ClassVar[str] = "keynorm"
    source: ClassVar[str] = "L2 norm, arXiv 2406.11430"
    cost: ClassVar[str] = "2*L*Hkv*P*D"
    needs: ClassVar[Need] = Need.KEYS
    never_negative: ClassVar[bool] = True

    power: float = 1.0

    def __post_init__(self) -> None:
        require_range("power", self.power, 0, 16)

    def score(self, ctx: ScoringContext) -> Scores:
        norm = ctx.keys.norm(dim=-1)  # [R, Hkv, T]
        score = norm.clamp_min(1e-6) ** -self.power
        return Scores(base=score, final=score)


VISUAL = Preset(
    "L2 norm, arXiv 2406.11430",
    {"method": "keynorm+adakv", "budget": "10%", "candidates": "visual"},
)
