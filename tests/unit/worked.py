# SPDX-License-Identifier: Apache-2.0
"""The fixture as the oracle sees it, and how the published worked examples are written down.

The prompt has 12 tokens: text 0, 1, image A 2..4, image B 5..7, instruction 8..11.
"""

import lcg
import numpy as np
from oracle import OracleConfig, Prompt, best_positions, kept_sets

SEGMENTS = [(2, 5), (5, 8)]
SMALL = {"window": lcg.WINDOW, "block_size": 1}
C4 = OracleConfig(budget=4 + lcg.WINDOW, **SMALL)
Q, K, V = lcg.queries_keys_values()


def rotate(layer, vectors, positions):
    """RoPE with theta 10000, halves split, in float64."""
    half = vectors.shape[-1] // 2
    angles = positions[0][:, None] * 10000.0 ** -(np.arange(half) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


INPUTS = {"v": V, "segments": SEGMENTS, "raw_q": Q, "rotate": rotate}
PROMPT = Prompt(Q, K, lcg.SCALE, **INPUTS)


def numbers(text: str) -> np.ndarray:
    """Rows of a table: numbers split by blanks, rows by |."""
    return np.array([[float(x) for x in row.split()] for row in text.split("|")]).squeeze()


def close(actual, expected: str) -> bool:
    """Equal up to the last of six printed digits."""
    np.testing.assert_allclose(actual, numbers(expected), rtol=0, atol=6e-7)
    return True


def sets(kept, columns: int = lcg.LENGTH) -> list[str]:
    """Kept positions below `columns` of the heads, as "5678 2345" per layer (a is 10, b is 11)."""
    return [
        " ".join("".join(f"{t:x}" for t in head if t < columns) for head in layer) for layer in kept
    ]


def kept(cfg: OracleConfig, columns: int = lcg.LENGTH, **inputs) -> list[str]:
    return sets(kept_sets(Q, K, cfg, lcg.SCALE, **(INPUTS | inputs)), columns)


def top(score: np.ndarray, count: int) -> str:
    return sets([[np.sort(best_positions(row, count)) for row in np.atleast_2d(score)]])[0]
