# SPDX-License-Identifier: Apache-2.0
"""More tokens for visual heads, as measured once per model."""

import functools
import logging
import math
from dataclasses import dataclass
from typing import ClassVar

from vllm_kvcompress.allocation.base import StaticAllocator
from vllm_kvcompress.allocation.profiles import load_head_scores
from vllm_kvcompress.allocation.rounding import apportion_host
from vllm_kvcompress.options import require_bool, require_choice, require_range

logger = logging.getLogger("vllm.kvcompress")

_HOW_TO = "make one with: vllm-kvcompress calibrate-heads MODEL"


@dataclass(frozen=True)
class SparseMM(StaticAllocator):
    """Head budgets of the whole model in proportion to how visual each head is.

    A KV head gets the even share rho * b and, of what is left, the part that the scores of its
    query heads have in the sum over all layers. Source: SparseMM, arXiv 2506.05344.

    Adaptation notes: what exceeds the prompt in a strong head goes to the others and the total is
    conserved to the token (``rounding="exact"``); the released code loses it (``"official"``). Keys
    of the file are parsed, their order does not matter. A file that does not fit the model is an
    error; the released code then budgets evenly.

    Options:
        head_scores: path of the JSON file of head scores; required.
        rho: share of the nominal budget that every head gets for sure.
        rounding: "exact", or "official" for the released integers; their sum is rounded up to
            whole blocks per head, and the heads share out what that adds, at any block size.
        allow_uniform_fallback: budget evenly if the file is of another model or all zero.
    """

    name: ClassVar[str] = "sparsemm"
    source: ClassVar[str] = "SparseMM, arXiv 2506.05344"
    per_layer: ClassVar[bool] = False
    cost: ClassVar[str] = "L*Hkv on the host"

    head_scores: str | None = None
    rho: float = 0.1
    rounding: str = "exact"
    allow_uniform_fallback: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.head_scores, str) or not self.head_scores:
            raise ValueError(
                "head_scores is required: the path of a JSON file with a score per query head; "
                + _HOW_TO
            )
        require_range("rho", self.rho, 0, 1)
        require_choice("rounding", self.rounding, ("exact", "official"))
        require_bool("allow_uniform_fallback", self.allow_uniform_fallback)
        total = math.fsum(score for layer in load_head_scores(self.head_scores) for score in layer)
        if not total and not self.allow_uniform_fallback:
            raise ValueError(f"{self.head_scores}: all head scores are 0; {_HOW_TO}")

    def check_model(self, num_layers: int, num_query_heads: int) -> None:
        assert self.head_scores is not None
        scores = load_head_scores(self.head_scores)
        found = len(scores), len(scores[0])
        if found != (num_layers, num_query_heads) and not self.allow_uniform_fallback:
            raise ValueError(
                f"{self.head_scores} has scores of {found[0]} layers x {found[1]} query heads, the "
                f"model has {num_layers} x {num_query_heads}; {_HOW_TO}"
            )

    def head_budgets(
        self, capacity: int, num_candidates: int, num_layers: int, num_heads: int
    ) -> list[list[int]]:
        assert self.head_scores is not None
        weights = _weights(self.head_scores, num_layers, num_heads, self.allow_uniform_fallback)
        even = int(capacity * self.rho)
        rest = (capacity - even) * num_layers * num_heads
        shares = [weight * rest + even for weight in weights]
        if self.rounding == "official":
            counts = [min(round(share), num_candidates) for share in shares]
        else:
            counts = apportion_host(shares, capacity * len(shares), 0, num_candidates)
        return [counts[i : i + num_heads] for i in range(0, len(counts), num_heads)]


@functools.cache
def _weights(path: str, num_layers: int, num_heads: int, allow_uniform: bool) -> list[float]:
    """Part of each KV head in the scores of all, layer by layer; the sum is 1."""
    scores = load_head_scores(path)
    total = math.fsum(score for layer in scores for score in layer)
    group = len(scores[0]) // num_heads
    if len(scores) == num_layers and len(scores[0]) == group * num_heads and total:
        return [
            math.fsum(layer[head * group : (head + 1) * group]) / total
            for layer in scores
            for head in range(num_heads)
        ]
    if not allow_uniform:
        raise ValueError(
            f"{path} does not fit {num_layers} layers of {num_heads} KV heads; {_HOW_TO}"
        )
    logger.warning("%s does not fit the model: sparsemm budgets all heads evenly", path)
    return [1 / (num_layers * num_heads)] * (num_layers * num_heads)
