# SPDX-License-Identifier: Apache-2.0
"""Scores from queries nobody has asked yet: shiftkv's proxies, ExpectedAttention's Gaussian."""

from __future__ import annotations

import numpy as np
import torch

from oracle.attention import by_group, softmax
from oracle.config import OracleConfig
from oracle.prompt import Prompt

LAYER_SEED = 1_000_003


def presets(cfg: OracleConfig) -> tuple[str, str, bool]:
    """shiftkv: stats, cover and mix_last, each the preset's unless it is set."""
    released = cfg.preset == "released"
    stats = cfg.stats or ("scalar" if released else "feature")
    cover = cfg.cover or ("floor" if released else "min")
    return stats, cover, released if cfg.mix_last is None else cfg.mix_last


def proxy_queries(prompt: Prompt, layer: int, cfg: OracleConfig) -> np.ndarray:
    """Queries [Hq, N, D] of noise around the prompt's own layer inputs, at later positions."""
    inputs = prompt.hidden[layer][-cfg.stat_ctx :].astype(np.float64)
    axis = None if presets(cfg)[0] == "scalar" else 0
    index = layer if prompt.layers is None else prompt.layers[layer]
    generator = torch.Generator().manual_seed(cfg.seed + LAYER_SEED * index)
    noise = torch.randn(cfg.proxies, inputs.shape[-1], generator=generator).numpy()
    proxies = inputs.mean(axis=axis) + cfg.gamma * inputs.std(axis=axis, ddof=1) * noise
    steps = np.arange(cfg.proxies) % (cfg.proxies // cfg.groups) + 1
    positions = prompt.last_position + steps * cfg.groups
    return prompt.rotate(layer, prompt.project(layer, proxies), positions[None])


def query_mass(queries: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """Attention of queries [Hq, N, D] over all keys [Hkv, P, D], mean per group. [Hkv, N, P]"""
    (num_q, count, _), num_kv = queries.shape, k.shape[0]
    keys = k.astype(np.float64)
    mass = np.zeros((num_kv, count, k.shape[1]))
    for head in range(num_q):
        group = head // (num_q // num_kv)
        mass[group] += softmax(queries[head].astype(np.float64) @ keys[group].T * scale)
    return mass / (num_q // num_kv)


def proxy_mass(prompt: Prompt, layer: int, cfg: OracleConfig) -> np.ndarray:
    """Attention of the proxies over the prompt. [Hkv, N, P]"""
    return query_mass(proxy_queries(prompt, layer, cfg), prompt.k[layer], prompt.scale)


def proxy_votes(mass: np.ndarray, last: np.ndarray, cfg: OracleConfig) -> np.ndarray:
    """Votes of groups of proxies plus the real last query's attention. [Hkv, P - 1]

    mass: [Hkv, N, P] of the proxies; last: [Hkv, P] of the last query.
    """
    _, cover, mix_last = presets(cfg)
    num_kv, count, length = mass.shape
    size = count // cfg.groups
    votes = np.zeros((num_kv, length))
    for head in range(num_kv):
        for group in mass[head, : size * cfg.groups].reshape(cfg.groups, size, length):
            total = group.sum(axis=0)
            if mix_last:
                total = ((total + last[head]) / (1 + size))[:-1]
            order = np.argsort(-total, kind="stable")
            covered = np.cumsum(total[order])
            goal = cfg.tau * covered[-1]
            # up to the goal, or the first that reaches it included
            chosen = int((covered <= goal).sum())
            if cover == "min":
                chosen = int((covered < goal).sum()) + 1
            votes[head, order[:chosen]] += 1
    return (votes + cfg.vote_lambda * last)[:, :-1]


def mean_rotation(prompt: Prompt, layer: int, horizon: int) -> np.ndarray:
    """RoPE's matrix [D, D], averaged over the `horizon` positions behind the prompt."""
    size = prompt.k.shape[-1]
    first = prompt.last_position + 1
    basis = np.repeat(np.eye(size)[:, None, :], horizon, axis=1)  # [D, F, D]
    rotated = prompt.rotate(layer, basis, np.arange(first, first + horizon)[None])
    return rotated.astype(np.float64).mean(axis=1).T


def expected_attention(prompt: Prompt, layer: int, cfg: OracleConfig) -> np.ndarray:
    """Attention of Gaussian future queries, times the value's norm; zero at sinks. [Hkv, P]"""
    start, scale = cfg.num_sinks, prompt.scale
    rotation = mean_rotation(prompt, layer, cfg.horizon)
    per_query = np.zeros((prompt.num_q, prompt.length))
    for head in range(prompt.num_q):
        queries = prompt.raw_q[layer, head, start:].astype(np.float64)
        mean = queries.mean(axis=0)
        keys = prompt.k[layer, head // (prompt.num_q // prompt.num_kv), start:].astype(np.float64)
        logits = keys @ (rotation @ mean) * scale
        if cfg.covariance:
            spread = rotation @ np.cov(queries.T, bias=True) @ rotation.T
            logits += np.einsum("ti,ij,tj->t", keys, spread, keys) * scale**2 / 2
        per_query[head, start:] = softmax(logits)
    score = by_group(per_query, prompt.num_kv) + cfg.epsilon
    if cfg.vnorm:
        score *= np.linalg.norm(prompt.v[layer].astype(np.float64), axis=-1)
    return score
