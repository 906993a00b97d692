# SPDX-License-Identifier: Apache-2.0
"""Which combinations of methods are refused, found by trying all of them."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.registry import needs_head_scores
from vllm_kvcompress.scoring import SCORERS

_PLACEHOLDERS = ("SCORER", "ALLOCATOR")

Combination = tuple[str, ...]
"""A value for each axis."""


def axes() -> dict[str, tuple[str, ...]]:
    """What is combined."""
    return {
        "scorer": tuple(SCORERS),
        "allocator": tuple(ALLOCATORS),
        "merge": ("none", *MERGES),
        "candidates": (Candidates.ALL.value, Candidates.VISUAL.value),
    }


class Refusals(NamedTuple):
    """What came of trying.

    Attributes:
        tried, served: how many combinations.
        reasons: where each is given; SCORER and ALLOCATOR stand for those of the combination.
    """

    tried: int
    served: int
    reasons: dict[str, set[Combination]]


def refused_combinations(head_scores: str) -> Refusals:
    """Try all combinations.

    Args:
        head_scores: a file of head scores, for methods that cannot be without.
    """
    literal: dict[str, set[Combination]] = {}
    tried, served = 0, 0
    for names in itertools.product(*axes().values()):
        scorer, allocator, merge, candidates = names
        raw = {"method": f"{scorer}+{allocator}+{merge}", "candidates": candidates}
        if needs_head_scores(raw["method"]):
            raw["head_scores"] = head_scores
        tried += 1
        try:
            KVCompressionConfig.parse(raw)
        except KVCompressionError as error:
            for line in str(error).splitlines()[1:]:
                literal.setdefault(line.removeprefix("  - "), set()).add(names)
        else:
            served += 1
    reasons: dict[str, set[Combination]] = {}
    for reason, where in literal.items():
        reasons.setdefault(_general(reason, where), set()).update(where)
    return Refusals(tried, served, reasons)


def _general(reason: str, where: set[Combination]) -> str:
    """The reason without the names that all its combinations share."""
    for axis, placeholder in enumerate(_PLACEHOLDERS):
        names = {combination[axis] for combination in where}
        if len(names) == 1:
            reason = re.sub(rf"\b{names.pop()}\b", placeholder, reason)
    return reason


def products(combinations: set[Combination]) -> list[list[tuple[str, ...]]]:
    """The same set as few products of names: rows with the names of each axis."""
    return _split(combinations, [*axes().values()])


def _split(
    combinations: set[Combination], axes: Sequence[tuple[str, ...]]
) -> list[list[tuple[str, ...]]]:
    if not axes:
        return [[]]
    alike: dict[frozenset[Combination], tuple[str, ...]] = {}  # names with the same rest
    for name in axes[0]:
        rest = frozenset(c[1:] for c in combinations if c[0] == name)
        if rest:
            alike[rest] = (*alike.get(rest, ()), name)
    return [[names, *row] for rest, names in alike.items() for row in _split(set(rest), axes[1:])]
