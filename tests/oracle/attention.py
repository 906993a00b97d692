# SPDX-License-Identifier: Apache-2.0
"""Attention probabilities in float64, and how scores are reduced, pooled and ordered."""

from __future__ import annotations

import numpy as np

from oracle.prompt import Prompt


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf is legal."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def logits_of(prompt: Prompt, layer: int, head: int, rows: np.ndarray) -> np.ndarray:
    """Logits of query head `head` at positions `rows` over all keys, future ones -inf. [R, P]"""
    group = prompt.num_q // prompt.num_kv
    queries = prompt.q[layer, head, rows].astype(np.float64)
    keys = prompt.k[layer, head // group].astype(np.float64)
    logits = queries @ keys.T * prompt.scale
    logits[np.arange(prompt.length)[None, :] > rows[:, None]] = -np.inf
    return logits


def row_means(prompt: Prompt, layer: int, rows: np.ndarray) -> np.ndarray:
    """Mean over `rows` of the causal attention of every query head. [Hq, P]"""
    heads = range(prompt.num_q)
    return np.stack([softmax(logits_of(prompt, layer, h, rows)).mean(axis=0) for h in heads])


def key_attention_sum(prompt: Prompt, layer: int) -> np.ndarray:
    """Attention that each key gets from all queries of each query head. [Hq, P]"""
    return row_means(prompt, layer, np.arange(prompt.length)) * prompt.length


def by_group(per_query: np.ndarray, num_kv: int, reduction: str = "mean") -> np.ndarray:
    """[Hq, n] -> [Hkv, n]: mean or max over the query heads of a group."""
    grouped = per_query.reshape(num_kv, -1, per_query.shape[-1])
    return grouped.mean(axis=1) if reduction == "mean" else grouped.max(axis=1)


def pool1d(x: np.ndarray, kernel: int, kind: str) -> np.ndarray:
    """Stride-1 pooling of the last axis; avg pads zeros and counts them, max pads -inf."""
    half, length = kernel // 2, x.shape[-1]
    pad = np.full((*x.shape[:-1], half), 0.0 if kind == "avg" else -np.inf)
    padded = np.concatenate([pad, x, pad], axis=-1)
    shifted = np.stack([padded[..., u : u + length] for u in range(kernel)])
    return shifted.sum(axis=0) / kernel if kind == "avg" else shifted.max(axis=0)


def descending(x: np.ndarray) -> np.ndarray:
    """Values sorted descending along the last axis, NaN last."""
    return -np.sort(-x, axis=-1)


def best_positions(score: np.ndarray, count: int) -> np.ndarray:
    """The `count` best positions: score descending, then position ascending; NaN last."""
    return np.argsort(-score, kind="stable")[:count]
