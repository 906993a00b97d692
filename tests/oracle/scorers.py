# SPDX-License-Identifier: Apache-2.0
"""Every scorer: [Hkv, n] per layer, higher = keep, over the n = P - R tokens before the recent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from oracle.attention import by_group, descending, key_attention_sum, row_means
from oracle.config import OracleConfig, recent_tokens
from oracle.elite import elite_importance
from oracle.prompt import Prompt
from oracle.proxies import expected_attention, proxy_mass, proxy_votes
from oracle.window import pool_along, window_rows, window_score

EPS = 1e-8
TINY = 1e-12


class Scored(NamedTuple):
    """Scores [Hkv, n] of one layer."""

    final: np.ndarray  # ranks the tokens of a head; +inf at sinks
    base: np.ndarray | None  # what adakv counts on; None where it is refused


@dataclass
class State:
    """What a scorer may know beside the prompt."""

    recent: int  # R
    capacity: int  # C_l of the layer
    trace: list[np.ndarray] = field(default_factory=list)  # bacon: E of the layers before


def last_row(prompt: Prompt, layer: int) -> np.ndarray:
    """Attention of the last query over all tokens. [Hq, P]"""
    return row_means(prompt, layer, np.array([prompt.length - 1]))


def snapkv(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    base = window_score(prompt, layer, cfg)
    return Scored(base, base)


class Calibration(NamedTuple):
    """bacon: all [Hkv, n] but the last two, which are [Hkv]."""

    score: np.ndarray  # S
    evidence: np.ndarray  # E
    persistence: np.ndarray  # Tr
    rho: np.ndarray
    lam: np.ndarray


def boundary_calibration(
    base: np.ndarray,  # [Hkv, n] B
    last: np.ndarray,  # [Hkv, n] Q
    trace: Sequence[np.ndarray],  # earlier E, each [Hkv, n]
    capacity: int,  # C_l
    cfg: OracleConfig,
    columns: Sequence[np.ndarray] = (),  # of images, to pool along
) -> Calibration:
    """The window score plus what the very last query sees more of."""
    evidence = np.maximum(last - base, 0.0)
    coherence = pool_along(evidence, columns, cfg.local_k, "avg")
    if cfg.mode == "rel":
        around = pool_along(base, columns, cfg.local_k, "avg")
        coherence = coherence * around / (around + base + EPS)
    persistence = np.zeros_like(base)
    if len(trace) > 0:
        persistence = np.mean(trace, axis=0)
        if cfg.mode == "rel":
            persistence = np.maximum(persistence - np.std(trace, axis=0), 0.0)

    value = evidence
    if cfg.mode != "e":
        value = value + coherence
    if cfg.mode in ("elt", "rel"):
        value = value + persistence

    count = max(1, min(int(cfg.topk_frac * capacity), base.shape[-1]))
    base_top = descending(base)[:, :count]
    value_top = descending(value)[:, :count]
    rho = np.ones(base.shape[0])
    if cfg.mode == "elt":
        rho = np.clip(value_top.mean(axis=1) / (base_top.mean(axis=1) + EPS), 0.0, 1.0)
    lam = cfg.lambda_c * rho * base_top.std(axis=1) / (value_top.std(axis=1) + EPS)
    return Calibration(base + lam[:, None] * value, evidence, persistence, rho, lam)


def bacon(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    base, last, columns = window_rows(prompt, layer, cfg)
    trace = state.trace[max(0, layer - cfg.trace_r) :]
    calibrated = boundary_calibration(base, last, trace, state.capacity, cfg, columns)
    evidence = calibrated.evidence
    if cfg.trace_reduce == "head_mean":
        evidence = np.tile(evidence.mean(axis=0), (prompt.num_kv, 1))
    state.trace.append(evidence)
    return Scored(calibrated.score, base)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors of length one along the last axis, float64."""
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), TINY)


def key_diversity(k: np.ndarray, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """div [Hkv, n] and r [Hkv], the mean off-diagonal cosine, of keys [Hkv, P, D]."""
    keys = unit(k)
    mean, length = keys.mean(axis=1), keys.shape[1]
    r = (length * (mean**2).sum(axis=-1) - 1) / (length - 1)
    return -np.einsum("gtd,gd->gt", keys[:, :prefix], mean), r


def to_scale_of(base: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x mapped to [0, 1] per head, then to the mean of the base score."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    normed = (x - low) / (high - low + EPS)
    return normed * base.mean(axis=-1, keepdims=True) / (normed.mean(axis=-1, keepdims=True) + EPS)


def mix(
    base: np.ndarray,  # [Hkv, n] A
    k: np.ndarray,  # [Hkv, P, D]
    v: np.ndarray,
    diversity: str,
    r: np.ndarray | None = None,  # [Hkv] instead of the keys' own
) -> np.ndarray:
    """mixkv: importance (attention and value norm) mixed with key diversity."""
    prefix = base.shape[-1]
    apart, own = key_diversity(k, prefix)
    ds = to_scale_of(base, apart)
    vs = to_scale_of(base, np.linalg.norm(v[:, :prefix].astype(np.float64), axis=-1))
    if diversity == "head":
        r = np.clip(own if r is None else r, 0.0, 1.0)[:, None]
        return r * ds + (1 - r) * (base + vs)
    if diversity == "knorm":
        norms = np.linalg.norm(k[:, :prefix].astype(np.float64), axis=-1)
        return base + to_scale_of(base, -norms)
    return {"flat": 0.33 * (ds + base + vs), "attn": base, "keydiff": ds, "vnorm": base + vs}[
        diversity
    ]


def mixkv(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    base = window_score(prompt, layer, cfg)
    return Scored(mix(base, prompt.k[layer], prompt.v[layer], cfg.diversity), base)


def aircache(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    importance, _ = elite_importance(prompt, layer, cfg.elite, cfg.elite_scope)
    score = by_group(importance, prompt.num_kv)[:, : prompt.length - 1]
    return Scored(score, score)


def shiftkv(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    last = by_group(last_row(prompt, layer), prompt.num_kv)
    votes = proxy_votes(proxy_mass(prompt, layer, cfg), last, cfg)
    base = np.zeros_like(votes)
    window = window_score(prompt, layer, cfg)
    base[:, : window.shape[-1]] = window
    return Scored(votes, base)


def subsidised(
    score: np.ndarray,  # [Hkv, n], not negative
    segments: Sequence[tuple[int, int]],
    cfg: OracleConfig,
) -> np.ndarray:
    """das: later segments that get less than those before them on average are raised to that."""
    out = score.copy()
    spans = [(start, min(end, score.shape[-1])) for start, end in segments]
    spans = [(start, end) for start, end in spans if start < end]
    for head, row in enumerate(score):
        # sinks of the base score are infinite and tell nothing of their image
        finite = [row[start:end][np.isfinite(row[start:end])] for start, end in spans]
        sizes = np.array([len(values) for values in finite])
        sums = np.array([values.sum() for values in finite])
        means = sums / np.maximum(sizes, 1)
        reference = np.cumsum(sums) / np.maximum(np.cumsum(sizes), 1)
        if cfg.reference == "global":
            reference = np.full_like(means, reference[-1] if len(spans) else 0.0)
        factors = np.clip(reference / np.maximum(means, TINY), 1.0, cfg.kmax)
        for (start, end), factor in zip(spans, factors, strict=True):
            out[head, start:end] = row[start:end] * (1 + cfg.eta * (factor - 1))
    return out


def das(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    final, base = SCORERS[cfg.base](prompt, layer, cfg.root, state)
    return Scored(subsidised(final, prompt.segments, cfg), base)


def h2o(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    score = by_group(key_attention_sum(prompt, layer), prompt.num_kv)
    if cfg.variant == "observed":
        score = score / (prompt.length - np.arange(prompt.length))
    if cfg.text_hard_cap:
        score = score + score.max(axis=1, keepdims=True) * ~prompt.visual
    score = score[:, : prompt.length - state.recent]
    return Scored(score, score)


def expected(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    score = expected_attention(prompt, layer, cfg)[:, : prompt.length - 1]
    base = score.copy()
    score[:, : cfg.num_sinks] = np.inf
    base[:, : cfg.num_sinks] = 0.0
    return Scored(score, base)


def keydiff(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    keys = unit(prompt.k[layer])
    score = -np.einsum("gtd,gd->gt", keys, unit(keys.mean(axis=1)))[:, : prompt.length - 1]
    return Scored(score, score + 1)


def streaming(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    score = np.tile(np.arange(prompt.length - 1, dtype=float), (prompt.num_kv, 1))
    score[:, : cfg.num_sinks] = np.inf
    return Scored(score, None)


def elastic(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    score = key_attention_sum(prompt, layer).mean(axis=0)[: prompt.length - 1]
    score[: cfg.num_sinks] = np.inf
    return Scored(np.tile(score, (prompt.num_kv, 1)), None)


def post_vision_rows(prompt: Prompt, cfg: OracleConfig) -> np.ndarray:
    """Rows that postvision and vlcache look at."""
    rows = prompt.instruction_len()
    return np.arange(max(0, prompt.length - cfg.window), prompt.length) if rows is None else rows


def postvision(prompt: Prompt, layer: int, cfg: OracleConfig, state: State) -> Scored:
    rows = post_vision_rows(prompt, cfg)
    sums = by_group(row_means(prompt, layer, rows), prompt.num_kv) * len(rows)
    return Scored(sums[:, : prompt.length - 1], sums[:, : prompt.length - 1])


SCORERS: dict[str, Callable[[Prompt, int, OracleConfig, State], Scored]] = {
    "snapkv": snapkv,
    "bacon": bacon,
    "bacon-plus": bacon,
    "mixkv": mixkv,
    "aircache": aircache,
    "shiftkv": shiftkv,
    "das": das,
    "h2o": h2o,
    "expected": expected,
    "keydiff": keydiff,
    "streaming": streaming,
    "elastic": elastic,
    "prefixkv": elastic,
    "postvision": postvision,
}


def score_layers(
    prompt: Prompt, cfg: OracleConfig, recent: int, capacities: Sequence[int]
) -> list[Scored]:
    """Scores of all layers; `capacities` are the C_l that bacon sees."""
    scored, trace = [], []
    for layer in range(prompt.num_layers):
        state = State(recent, capacities[layer], trace)
        scored.append(SCORERS[cfg.scorer](prompt, layer, cfg, state))
    return scored


def scores(
    q: np.ndarray, k: np.ndarray, cfg: OracleConfig, scale: float, **inputs: object
) -> np.ndarray:
    """Final score of every token before the recent ones, with C_l = budget - W.

    q [L, Hq, P, D], k [L, Hkv, P, D]; `inputs`: what else a `Prompt` has. -> [L, Hkv, n] float64.
    """
    prompt = Prompt(q, k, scale, **inputs)
    capacities = [cfg.budget - cfg.window] * prompt.num_layers
    scored = score_layers(prompt, cfg, recent_tokens(cfg, cfg.budget), capacities)
    return np.stack([layer.final for layer in scored])
