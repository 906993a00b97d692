# SPDX-License-Identifier: Apache-2.0
"""Boundary calibration of window scores that know images and outputs."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.base import Need
from vllm_kvcompress.scoring.window_options import needs_of


@dataclass(frozen=True)
class BaconPlus(Bacon):
    """BACON on a window score that follows images' rows or columns and weighs values.

    Window mean and last row are pooled along the orientation of each image in each layer; the mean
    is clamped from below at its own mean over the prompt and multiplied by the norm of the value's
    part of the layer's output, ||Wo v||; the last row is scaled to the same sum. Evidence and
    calibration are those of bacon, with coherence along the same orientation. The orientation is
    that with the larger sum of geometric means of neighbouring window scores.
    Source: this project, on BACON, arXiv 2606.14782; the clamp is a part of DefensiveKV, arXiv
    2510.13334.

    Adaptation notes: our own method; no paper describes it. The output projection is the base
    model's, also for requests with a LoRA adapter; gates and norms between attention and it are
    left out.

    Options: those of bacon and snapkv, with other defaults.
    """

    name: ClassVar[str] = "bacon-plus"
    source: ClassVar[str] = "this project, on BACON, arXiv 2606.14782"
    cost: ClassVar[str] = "as bacon, plus 2*L*Hq*P*D^2 and a read of V"
    needs: ClassVar[Need] = Bacon.needs | needs_of(True, "output")
    reconstruction: ClassVar[bool] = True

    grid: bool = True
    clamp: bool = True
    weight: str = "output"

    @classmethod
    def _needs_without_options(cls) -> Need:
        return Bacon.needs
