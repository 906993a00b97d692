# SPDX-License-Identifier: Apache-2.0
"""One compression setting, and the budget that it means for one prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

SCORERS = (
    "snapkv",
    "bacon",
    "bacon-plus",
    "mixkv",
    "aircache",
    "shiftkv",
    "das",
    "h2o",
    "expected",
    "keydiff",
    "streaming",
    "elastic",
    "prefixkv",
    "postvision",
)
ALLOCATORS = ("uniform", "pyramid", "adakv", "sparsemm", "aircache", "prefixkv", "vlcache")
DAS_BASES = tuple(name for name in SCORERS if name not in ("das", "keydiff", "streaming"))
CHOICES = {
    "scorer": SCORERS,
    "base": DAS_BASES,
    "allocator": ALLOCATORS,
    "merge": ("none", "lookm", "elastic", "recycle"),
    "candidates": (None, "all", "visual"),
    "pool": ("avg", "max"),
    "reduction": ("mean", "max"),
    "mode": ("e", "el", "elt", "rel"),
    "score_dtype": ("float32", "model"),
    "weight": (None, "none", "output"),
    "trace_reduce": ("head", "head_mean"),
    "diversity": ("head", "flat", "attn", "keydiff", "vnorm", "knorm"),
    "elite_scope": ("head", "layer"),
    "statistic": ("both", "strength", "skewness"),
    "preset": ("released", "paper"),
    "stats": (None, "scalar", "feature"),
    "cover": (None, "floor", "min"),
    "reference": ("running", "global"),
    "variant": ("sum", "observed"),
    "rounding": ("exact", "official"),
    "merge_mode": ("pivot", "avg", "weighted"),
}
WINDOWED = ("snapkv", "bacon", "bacon-plus", "mixkv", "h2o")
"""Scorers that always keep the window; all others keep the last token only."""

SHARED = ("elastic", "prefixkv")
"""Scorers with one kept set for all heads of a layer."""


@dataclass(frozen=True)
class OracleConfig:
    """One compression setting; options that the methods in use do not have are ignored."""

    budget: int | str  # tokens per KV head, or "P%" of the prompt (of its candidates, if visual)
    scorer: str = "snapkv"
    allocator: str = "uniform"
    merge: str = "none"
    candidates: str | None = None  # all | visual; None is the scorer's own default
    window: int = 32
    block_size: int = 32
    pool_block: int = 1  # blocks that can only be freed together
    kernel: int = 5  # snapkv and all that build on its score
    pool: str = "avg"  # avg | max
    reduction: str = "mean"  # mean | max, over the query heads of a group
    score_dtype: str = "float32"  # or "model", the same here: prompts of the oracle are float32
    grid: bool | None = None  # None: as clamp and weight, only in bacon-plus
    clamp: bool | None = None
    weight: str | None = None  # none | output
    mode: str = "elt"  # bacon: e | el | elt | rel
    local_k: int = 5
    trace_r: int = 4
    lambda_c: float = 0.5
    topk_frac: float = 2.0
    trace_reduce: str = "head"  # head | head_mean
    diversity: str = "head"  # mixkv: head | flat | attn | keydiff | vnorm | knorm
    elite: float = 0.9  # aircache, scorer and allocator
    elite_scope: str = "head"  # aircache: head | layer
    statistic: str = "both"  # aircache allocator: both | strength | skewness
    preset: str = "released"  # shiftkv: released | paper, which decides what is None below
    proxies: int = 512
    groups: int = 32
    gamma: float = 10.0
    tau: float = 0.95
    vote_lambda: float = 1.0
    stats: str | None = None  # scalar | feature
    cover: str | None = None  # floor | min
    mix_last: bool | None = None
    stat_ctx: int = 0  # tokens; 0 = all
    seed: int = 0
    base: str = "snapkv"  # das
    base_options: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 1.0
    kmax: float = 8.0
    reference: str = "running"  # running | global
    variant: str = "sum"  # h2o: sum | observed
    recent_share: float = 0.0  # of the budget; 0 = the window
    text_prior: bool = False
    text_hard_cap: bool = False
    horizon: int = 512  # expected
    covariance: bool = True
    vnorm: bool = True
    epsilon: float = 0.0
    sinks: int | None = None  # None: 4 in expected and streaming, 1 in elastic and prefixkv
    beta: float = 20  # pyramid
    alpha: float = 0.2  # adakv floor
    normalize: bool = True  # adakv
    rounding: str = "exact"  # pyramid, adakv, sparsemm: exact | official
    head_scores: Any = None  # sparsemm: [L, Hq], or a JSON file of "layer-head": [numbers]
    rho: float = 0.1  # sparsemm
    threshold: float = 0.01  # vlcache
    merge_mode: str = "pivot"  # lookm: pivot | avg | weighted
    bins: int = 1  # recycle, per segment

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("kernel", "local_k"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise ValueError(f"{name}: expected an odd number >= 1, got {getattr(self, name)}")
        if self.ratio is None and not self.visual and not 0 < self.window < self.budget:
            raise ValueError(f"expected 0 < window < budget, got {self.window} and {self.budget}")
        if self.refusals():
            raise ValueError("; ".join(self.refusals()))

    def refusals(self) -> list[str]:
        """Reasons why these methods do not go together."""
        scorer, reasons = self.root.scorer, []
        if self.allocator == "adakv" and scorer in ("streaming", *SHARED):
            reasons.append(f"adakv has no score to count on with {scorer}")
        if self.allocator == "sparsemm" and scorer in SHARED:
            reasons.append(f"{scorer} keeps one set per layer, sparsemm budgets are per head")
        if self.merge == "elastic" and scorer not in SHARED:
            reasons.append("merge elastic needs one kept set per layer")
        if self.merge == "recycle" and scorer in ("keydiff", "streaming"):
            reasons.append(f"merge recycle needs weights, {scorer} has none")
        if scorer == "aircache" and not self.visual:
            reasons.append("aircache scores visual tokens only")
        return reasons

    @property
    def ratio(self) -> Fraction | None:
        """A budget in percent, exactly; None if it is in tokens."""
        if isinstance(self.budget, int):
            return None
        return Fraction(self.budget.removesuffix("%")) / 100

    @property
    def visual(self) -> bool:
        """Whether only visual tokens can be dropped."""
        if self.text_prior and not self.text_hard_cap and self.scorer == "h2o":
            return True
        default = "visual" if self.scorer in ("aircache", "das") else "all"
        return (self.candidates or default) == "visual"

    @property
    def root(self) -> OracleConfig:
        """The configuration of the score below das; itself for every other scorer."""
        if self.scorer != "das":
            return self
        candidates = "visual" if self.visual else "all"
        return replace(self, scorer=self.base, candidates=candidates, **self.base_options)

    @property
    def uses_grid(self) -> bool:
        """Images are pooled along rows or columns."""
        return self.scorer == "bacon-plus" if self.grid is None else self.grid

    @property
    def uses_clamp(self) -> bool:
        """Scores below the mean are raised to it."""
        return self.scorer == "bacon-plus" if self.clamp is None else self.clamp

    @property
    def uses_weight(self) -> bool:
        """Scores are multiplied by what values add to the output."""
        return (self.weight or ("none", "output")[self.scorer == "bacon-plus"]) == "output"

    @property
    def num_sinks(self) -> int:
        """First tokens of the prompt that rank above all others."""
        if self.sinks is not None:
            return self.sinks
        return {"expected": 4, "streaming": 4}.get(self.scorer, 1)


class Budget(NamedTuple):
    """A configuration's budget for one prompt, in tokens per KV head."""

    kept: int  # K: everything included, before whole pages
    pinned: int  # what allocators leave out: the window, or all that is not a candidate
    capacity: int  # b, what allocators share out: kept = pinned + capacity
    num_candidates: int  # most that one head can get of it
    recent: int  # R, last tokens that are always kept
    candidates: np.ndarray  # [P] bool, tokens that compete (postvision: before its own R)


def recent_tokens(cfg: OracleConfig, kept: int) -> int:
    """R: how many of the last tokens a scorer never drops."""
    root = cfg.root
    if root.scorer == "h2o" and root.recent_share:
        return math.floor(Fraction(str(root.recent_share)) * kept)
    return root.window if root.scorer in WINDOWED else 1


def budget_of(visual: np.ndarray, cfg: OracleConfig) -> Budget:
    """The budget for a prompt whose visual tokens are given as a mask [P]."""
    length, ratio = len(visual), cfg.ratio
    kept = cfg.budget
    if ratio is not None:
        kept = max(math.ceil(ratio * length), cfg.block_size, cfg.window + 1)
    recent = recent_tokens(cfg, kept)
    scored = np.arange(length) < length - recent
    if not cfg.visual:
        window = cfg.window
        return Budget(kept, window, kept - window, length - window, recent, scored)

    candidates = visual & scored
    count = int(candidates.sum())
    if cfg.text_prior and cfg.scorer == "h2o":
        capacity = min(count, max(0, kept - recent - int(scored.sum() - count)))
    elif ratio is None:
        capacity = min(cfg.budget, count)
    else:
        capacity = min(count, max(1, round(ratio * count)))
    pinned = length - count
    return Budget(pinned + capacity, pinned, capacity, count, recent, candidates)
