# SPDX-License-Identifier: Apache-2.0
"""Window scores: pooled along text, along rows or columns of images, raised and weighed."""

from __future__ import annotations

import numpy as np

from oracle.attention import by_group, pool1d, row_means
from oracle.config import OracleConfig
from oracle.prompt import Prompt


def columns_of(scores: np.ndarray, prompt: Prompt, cfg: OracleConfig) -> list[np.ndarray]:
    """Positions below n of every column of the images that a layer looks down.

    scores: [Hkv, n] window mean before pooling.
    """
    found: list[np.ndarray] = []
    prefix = scores.shape[-1]
    for first, rows, width in prompt.grids if cfg.uses_grid else ():
        across = down = 0.0
        for row in range(rows):
            for column in range(width):
                here = first + row * width + column
                if here >= prefix:
                    continue
                if column + 1 < width and here + 1 < prefix:
                    across += np.sqrt(scores[:, here] * scores[:, here + 1]).sum()
                if row + 1 < rows and here + width < prefix:
                    down += np.sqrt(scores[:, here] * scores[:, here + width]).sum()
        if down > across:
            lines = first + np.arange(rows * width).reshape(rows, width).T
            found += [line[line < prefix] for line in lines]
    return found


def pool_along(x: np.ndarray, columns: list[np.ndarray], kernel: int, kind: str) -> np.ndarray:
    """[..., n]: along the prompt, and where columns are given along each of them."""
    pooled = pool1d(x, kernel, kind)
    for positions in columns:
        if len(positions):
            pooled[..., positions] = pool1d(x[..., positions], kernel, kind)
    return pooled


def output_norms(prompt: Prompt, layer: int) -> np.ndarray:
    """Mean over the group's query heads of ||Wo v||. [Hkv, P]"""
    group = prompt.num_q // prompt.num_kv
    norms = []
    for head in range(prompt.num_q):
        values = prompt.v[layer, head // group].astype(np.float64)
        made = values @ prompt.wo[layer, head].astype(np.float64)
        norms.append(np.sqrt((made**2).sum(axis=-1)))
    return by_group(np.stack(norms), prompt.num_kv)


def raised(pooled: np.ndarray, prompt: Prompt, layer: int, cfg: OracleConfig) -> np.ndarray:
    """[Hkv, n] after the clamp at the mean and the weight."""
    if cfg.uses_clamp:
        pooled = np.maximum(pooled, pooled.mean(axis=-1, keepdims=True))
    if cfg.uses_weight:
        pooled = pooled * output_norms(prompt, layer)[:, : pooled.shape[-1]]
    return pooled


def window_rows(
    prompt: Prompt, layer: int, cfg: OracleConfig
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Pooled mean of the window and pooled last row, [Hkv, n] each, and columns to pool along."""
    prefix = max(0, prompt.length - cfg.window)
    means = row_means(prompt, layer, np.arange(prefix, prompt.length))
    lasts = row_means(prompt, layer, np.array([prompt.length - 1]))
    mean, last = (
        by_group(part[:, :prefix], prompt.num_kv, cfg.reduction) for part in (means, lasts)
    )
    columns = columns_of(mean, prompt, cfg)
    base = pool_along(mean, columns, cfg.kernel, cfg.pool)
    last = pool_along(last, columns, cfg.kernel, cfg.pool)
    if cfg.uses_clamp or cfg.uses_weight:
        base = raised(base, prompt, layer, cfg)
        masses = last.sum(axis=-1, keepdims=True)
        last = last * base.sum(axis=-1, keepdims=True) / np.where(masses > 0, masses, 1.0)
    return base, last, columns


def window_score(prompt: Prompt, layer: int, cfg: OracleConfig) -> np.ndarray:
    """B [Hkv, P - W]: what the last W queries look at."""
    return window_rows(prompt, layer, cfg)[0]
