# SPDX-License-Identifier: Apache-2.0
"""More tokens for low layers, fewer for high ones."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vllm_kvcompress.allocation.base import StaticAllocator
from vllm_kvcompress.allocation.rounding import apportion_host
from vllm_kvcompress.options import require_choice, require_whole


@dataclass(frozen=True)
class Pyramid(StaticAllocator):
    """Layer budgets on a straight line from about 2 * b tokens at the bottom to b / beta on top.

    All heads of a layer get the same number; no layer gets more than the prompt offers.
    Source: PyramidKV, arXiv 2406.02069.

    Adaptation notes: the model's total is conserved to the token (``rounding="exact"``). The
    released integer step is kept as ``"official"``; it spends up to min(L / 2 - 1, b - b div beta)
    tokens per head more than b, 48 % of a budget of 64 from 64 layers on: compare it with others at
    equal kept tokens, not at equal budgets. The schedule follows the length of each prompt; the
    released code keeps that of the first prompt it sees.

    Options:
        beta: how many times smaller than the nominal budget the top layer's is.
        rounding: "exact", or "official" for the released integers; their sum is rounded up to
            whole blocks per head, and the layers share out what that adds.
    """

    name: ClassVar[str] = "pyramid"
    source: ClassVar[str] = "PyramidKV, arXiv 2406.02069"
    cost: ClassVar[str] = "L on the host"

    beta: int = 20
    rounding: str = "exact"

    def __post_init__(self) -> None:
        require_whole("beta", self.beta, 1)
        require_choice("rounding", self.rounding, ("exact", "official"))

    def head_budgets(
        self, capacity: int, num_candidates: int, num_layers: int, num_heads: int
    ) -> list[list[int]]:
        layers = [capacity]
        if num_layers > 1:
            schedule = self._official if self.rounding == "official" else self._exact
            layers = schedule(capacity, num_candidates, num_layers)
        return [[tokens] * num_heads for tokens in layers]

    def _exact(self, capacity: int, num_candidates: int, num_layers: int) -> list[int]:
        low = Fraction(capacity, self.beta)
        high = min(2 * capacity - low, Fraction(num_candidates))
        step = 2 * (high - capacity) / (num_layers - 1)  # the mean of the line is the capacity
        line = [high - layer * step for layer in range(num_layers)]
        return apportion_host(line, capacity * num_layers, 0, num_candidates)

    def _official(self, capacity: int, num_candidates: int, num_layers: int) -> list[int]:
        high = min(2 * capacity - capacity // self.beta, num_candidates)
        step = 2 * (high - capacity) // (num_layers - 1)
        return [high - layer * step for layer in range(num_layers)]
