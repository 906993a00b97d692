# SPDX-License-Identifier: Apache-2.0
"""Every allocator: K[l, g], the tokens that each KV head keeps before whole pages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from oracle.attention import descending, key_attention_sum, logits_of, softmax
from oracle.config import Budget, OracleConfig
from oracle.elite import elite_importance
from oracle.prompt import Prompt
from oracle.scorers import Scored, post_vision_rows

HeadTokens = list[list[int]]  # [L][Hkv]

PER_LAYER = ("uniform", "pyramid", "aircache", "prefixkv", "vlcache")
"""Allocators that treat the heads of a layer alike."""

STATIC = ("uniform", "pyramid", "sparsemm")
"""Allocators that know all of K from the prompt's length and modality."""


def apportion(x: Sequence[Fraction | float], total: int, lo: int, hi: int) -> list[int]:
    """Round x to integers in [lo, hi] that sum to `total` (clamped to what is possible).

    Exact rationals, so equal remainders are equal and the lower index wins.
    """
    y = [min(max(Fraction(v), Fraction(lo)), Fraction(hi)) for v in x]
    # a float just below an integer means that integer
    out = [math.floor(v + Fraction(1, 10**12)) for v in y]
    rest = min(max(total, lo * len(y)), hi * len(y)) - sum(out)
    step = 1 if rest > 0 else -1
    order = sorted(range(len(y)), key=lambda i: (-step * (y[i] - out[i]), i))
    while rest != 0:
        for i in order:
            if rest != 0 and lo <= out[i] + step <= hi:
                out[i] += step
                rest -= step
    return out


def pyramid(layers: int, share: int, limit: int, cfg: OracleConfig) -> list[int]:
    """C_l: scored tokens per layer, falling linearly; `share` on average, at most `limit`."""
    if limit <= share:
        return [limit] * layers
    exact = cfg.rounding == "exact"
    beta = Fraction(str(cfg.beta))
    low = Fraction(share) / beta if exact else Fraction(share // beta)
    high = 2 * share - low
    if high >= limit:
        high, low = Fraction(limit), Fraction(2 * share - limit)
    if layers == 1:
        return [share]
    if exact:
        shares = [high - (high - low) * layer / (layers - 1) for layer in range(layers)]
        return apportion(shares, share * layers, 0, limit)
    step = (high - low) // (layers - 1)
    return [int(high - layer * step) for layer in range(layers)]


def adakv_capacities(
    base: np.ndarray, cfg: OracleConfig, share: int | None = None, limit: int | None = None
) -> list[int]:
    """Scored tokens per KV head of one layer.

    base: [Hkv, n] what heads compete with; share: b, without it the budget's; limit: most that one
    head can get, without it n.
    """
    num_kv, prefix = base.shape
    share = cfg.budget - cfg.window if share is None else share
    limit = prefix if limit is None else limit
    desc = descending(base)
    if cfg.normalize:
        desc = desc * (desc[:, :share].sum(axis=1) / desc.sum(axis=1))[:, None]
    # a stable sort of the row-major values breaks ties by head, then by rank inside the head
    winners = np.argsort(-desc.ravel(), kind="stable")[: num_kv * share]
    counts = np.bincount(winners // prefix, minlength=num_kv).tolist()
    if cfg.rounding == "official":
        floor = int(share * cfg.alpha)
        return [min(round(c * (1 - cfg.alpha) + floor), limit) for c in counts]
    alpha = Fraction(str(cfg.alpha))
    return apportion([c * (1 - alpha) + share * alpha for c in counts], num_kv * share, 0, limit)


def head_scores(source: Any) -> np.ndarray:
    """sparsemm: scores [L, Hq], from an array or from a JSON file of "layer-head": [numbers]."""
    if not isinstance(source, str | Path):
        return np.asarray(source, dtype=np.float64)
    table = json.loads(Path(source).read_text())
    indices = {key: tuple(int(part) for part in key.split("-")) for key in table}
    out = np.full(np.max(list(indices.values()), axis=0) + 1, np.nan)
    for key, numbers in table.items():
        out[indices[key]] = np.mean(numbers)
    if np.isnan(out).any():
        raise ValueError("head_scores: expected one entry for each layer and query head")
    return out


def sparsemm(layers: int, num_kv: int, share: int, limit: int, cfg: OracleConfig) -> HeadTokens:
    """C[l, g]: a uniform part, and the rest by how visual the query heads of a group are."""
    sigma = head_scores(cfg.head_scores)
    if sigma.shape[0] != layers or sigma.shape[1] % num_kv:
        raise ValueError(f"head_scores: expected {layers} layers of KV groups, got {sigma.shape}")
    group = sigma.shape[1] // num_kv
    exact = [[Fraction(value) for value in row] for row in sigma.tolist()]
    total = sum(map(sum, exact))
    least = math.floor(share * Fraction(str(cfg.rho)))
    rest = (share - least) * layers * sigma.shape[1] // group
    shares = [
        sum(row[g * group : (g + 1) * group]) / total * rest + least
        for row in exact
        for g in range(num_kv)
    ]
    if cfg.rounding == "official":
        flat = [min(round(x), limit) for x in shares]
    else:
        flat = apportion(shares, share * layers * num_kv, 0, limit)
    return [flat[start : start + num_kv] for start in range(0, len(flat), num_kv)]


def skewness(x: np.ndarray) -> float:
    """Bias-corrected skewness of at least three numbers; 0 if they are all equal."""
    count, spread = len(x), x.std(ddof=1)
    if spread == 0:
        return 0.0
    cubes = ((x - x.mean()) / spread) ** 3
    return float(count / ((count - 1) * (count - 2)) * cubes.sum())


def aircache_shares(prompt: Prompt, cfg: OracleConfig) -> np.ndarray | None:
    """Relative size of each layer, 1 on average; None with fewer than three visual tokens."""
    if prompt.visual.sum() < 3:
        return None
    strength, skew = np.zeros((2, prompt.num_layers))
    for layer in range(prompt.num_layers):
        importance, _ = elite_importance(prompt, layer, cfg.elite, cfg.elite_scope)
        mean = importance[:, prompt.visual].mean(axis=0)
        strength[layer], skew[layer] = mean.sum(), max(skewness(mean), 0.0)
    strength = strength / strength.mean()
    if cfg.statistic == "strength" or skew.sum() == 0:
        return strength
    skew = skew / skew.mean()
    return skew if cfg.statistic == "skewness" else (strength + skew) / 2


def prefix_sizes(priority: np.ndarray, total: int) -> tuple[list[int], float]:
    """Sizes o_l of the layers for priorities c [L, T], and the information level p they share.

    A layer holds the fewest of its tokens, best first, that carry the fraction p of its priority;
    p is the largest for which the sizes sum to no more than `total`. Left-over slots go one by one
    to the layer whose next token is worth most.
    """
    layers, length = priority.shape
    total = min(max(total, layers), layers * length)
    worth = descending(priority) / priority.sum(axis=1, keepdims=True)
    carried = np.cumsum(worth, axis=1)

    def sizes(level: float) -> list[int]:
        return [min(int(np.searchsorted(row, level)) + 1, length) for row in carried]

    # sizes change at these levels only
    fitting = [level for level in np.unique(carried) if sum(sizes(level)) <= total]
    level = float(fitting[-1]) if fitting else 0.0
    out = sizes(level)
    while sum(out) < total:
        offers = [
            row[size] if size < length else -np.inf for row, size in zip(worth, out, strict=True)
        ]
        out[int(np.argmax(offers))] += 1
    return out, level


def prefixkv(prompt: Prompt, total: int) -> list[int]:
    """K per layer, by the attention that tokens get from all queries."""
    layers = range(prompt.num_layers)
    return prefix_sizes(
        np.stack([key_attention_sum(prompt, i).mean(axis=0) for i in layers]), total
    )[0]


def sparsity(prompt: Prompt, layer: int, rows: np.ndarray, threshold: float) -> float:
    """vlcache's gamma: share of the visible keys below `threshold` times their row's maximum."""
    visible = np.arange(prompt.length)[None, :] <= rows[:, None]
    per_head = []
    for head in range(prompt.num_q):
        weights = softmax(logits_of(prompt, layer, head, rows))
        small = (weights < threshold * weights.max(axis=1, keepdims=True)) & visible
        per_head.append(small.sum() / visible.sum())
    return float(np.mean(per_head))


def vlcache_sizes(gamma: np.ndarray, kept: int, length: int) -> list[int]:
    """k_l for the sparsities gamma [L]; `kept` tokens on average."""
    layers, dense = len(gamma), 1 - gamma
    beta = np.clip(kept / length * layers * dense / dense.sum(), 0.01, 1)
    return apportion((beta * length).tolist(), kept * layers, max(1, length // 100), length)


def vlcache(prompt: Prompt, kept: int, cfg: OracleConfig) -> list[int]:
    """K per layer, by how dense the attention behind the images is."""
    rows = post_vision_rows(prompt, cfg)
    layers = range(prompt.num_layers)
    gamma = np.array([sparsity(prompt, layer, rows, cfg.threshold) for layer in layers])
    return vlcache_sizes(gamma, kept, prompt.length)


def layer_capacities(layers: int, budget: Budget, cfg: OracleConfig) -> list[int]:
    """C_l as bacon sees it: of the layer under pyramid, else the same in all layers."""
    if cfg.allocator == "pyramid":
        return pyramid(layers, budget.capacity, budget.num_candidates, cfg)
    return [budget.capacity] * layers


def static_tokens(layers: int, num_kv: int, budget: Budget, cfg: OracleConfig) -> HeadTokens:
    """K of an allocator that never looks at scores."""
    if cfg.allocator == "sparsemm":
        scored = sparsemm(layers, num_kv, budget.capacity, budget.num_candidates, cfg)
    else:
        scored = [[c] * num_kv for c in layer_capacities(layers, budget, cfg)]
    return [[count + budget.pinned for count in heads] for heads in scored]


def head_tokens(
    prompt: Prompt, budget: Budget, scored: Sequence[Scored], cfg: OracleConfig
) -> HeadTokens:
    """K[l, g] for one prompt."""
    layers, num_kv = prompt.num_layers, prompt.num_kv
    share, limit = budget.capacity, budget.num_candidates
    if cfg.allocator in STATIC:
        return static_tokens(layers, num_kv, budget, cfg)
    if cfg.allocator == "adakv":
        per_head = []
        for layer in scored:
            competing = layer.base[:, budget.candidates[: layer.base.shape[-1]]]
            per_head.append(adakv_capacities(competing, cfg, share, limit))
        return [[count + budget.pinned for count in heads] for heads in per_head]

    if cfg.allocator == "aircache":
        relative = aircache_shares(prompt, cfg)
        counts = [share] * layers
        if relative is not None:
            counts = apportion((share * relative).tolist(), share * layers, 1, limit)
        kept = [count + budget.pinned for count in counts]
    elif cfg.allocator == "prefixkv":
        kept = prefixkv(prompt, budget.kept * layers)
    else:
        kept = vlcache(prompt, budget.kept, cfg)
    return [[count] * num_kv for count in kept]
