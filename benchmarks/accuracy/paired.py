# SPDX-License-Identifier: Apache-2.0
"""Statistics of right and wrong answers to the same questions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959964
"""Of a normal distribution, 95 % lie within so many standard deviations."""


class Interval(NamedTuple):
    """Bounds of a share, 0 to 1."""

    low: float
    high: float


class Comparison(NamedTuple):
    """Two methods on the same questions.

    Attributes:
        wins: questions that only the first one answers.
        losses: questions that only the second one answers.
        p: of the exact two-sided McNemar test.
    """

    wins: int
    losses: int
    p: float


def wilson(right: int, count: int) -> Interval:
    """95 % interval of a share by Wilson's score; (0, 1) where nothing was asked."""
    if not count:
        return Interval(0.0, 1.0)
    share, square = right / count, Z95 * Z95 / count
    middle = share + square / 2
    spread = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count))
    # rounding must not put an end beyond the share itself
    low, high = ((middle + sign * spread) / (1 + square) for sign in (-1, 1))
    return Interval(max(0.0, min(low, share)), min(1.0, max(high, share)))


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p: how likely discordant pairs are at least that uneven by chance."""
    total, few = wins + losses, min(wins, losses)
    tail = sum(math.comb(total, k) for k in range(few + 1)) / 2**total
    return min(1.0, 2 * tail)


def compare(first: Sequence[bool], second: Sequence[bool]) -> Comparison:
    """First against second, question by question."""
    pairs = list(zip(first, second, strict=True))
    wins = sum(a and not b for a, b in pairs)
    losses = sum(b and not a for a, b in pairs)
    return Comparison(wins, losses, mcnemar(wins, losses))
