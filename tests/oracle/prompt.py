# SPDX-License-Identifier: Apache-2.0
"""What one uncompressed prefill leaves behind: the input of every scorer, allocator and merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_ROWS = 256
"""Most text rows behind the last visual token that a score may use."""

Project = Callable[[int, np.ndarray], np.ndarray]
"""(layer, inputs of its attention [N, d]) -> queries before RoPE [Hq, N, D]."""

Rotate = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(layer, vectors [H, N, D], positions [C, N]) -> the same after RoPE."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt; what a configuration does not use may be left out.

    Attributes:
        q: [L, Hq, P, D] after norm and RoPE.
        k, v: [L, Hkv, P, D] as they stand in the cache.
        scale: of the attention logits.
        segments: half-open runs of visual tokens, in order.
        positions: [C, P] RoPE positions; C is 3 under M-RoPE, else 1. Left out: 0 .. P-1.
        hidden: [L, P, d] what each attention layer reads (behind its norm).
        raw_q: [L, Hq, P, D] after norm, before RoPE.
        project, rotate: the model's own.
        layers: [L] index of each in the model; left out: all are here.
        grids: first position, rows and columns of each image whose tokens stand row by row.
        wo: [L, Hq, D, d] output projection, by the query head that it reads.
    """

    q: np.ndarray
    k: np.ndarray
    scale: float
    v: np.ndarray | None = None
    segments: Sequence[tuple[int, int]] = ()
    positions: np.ndarray | None = None
    hidden: np.ndarray | None = None
    raw_q: np.ndarray | None = None
    project: Project | None = None
    rotate: Rotate | None = None
    layers: Sequence[int] | None = None
    grids: Sequence[tuple[int, int, int]] = ()
    wo: np.ndarray | None = None

    @property
    def num_layers(self) -> int:
        return self.k.shape[0]

    @property
    def num_q(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv(self) -> int:
        return self.k.shape[1]

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @cached_property
    def visual(self) -> np.ndarray:
        """[P] bool, true on visual tokens."""
        return visual_mask(self.length, self.segments)

    @property
    def last_position(self) -> int:
        """RoPE position of the last token, the largest of its components."""
        return self.length - 1 if self.positions is None else int(self.positions[:, -1].max())

    def instruction_len(self) -> np.ndarray | None:
        """Text behind the last visual token, at most `MAX_ROWS`; None without visual tokens.

        Ends the prompt with a visual token, its last row stands in.
        """
        if not self.visual.any():
            return None
        first = int(np.flatnonzero(self.visual)[-1]) + 1
        first = min(max(first, self.length - MAX_ROWS), self.length - 1)
        return np.arange(first, self.length)


def visual_mask(length: int, segments: Sequence[tuple[int, int]]) -> np.ndarray:
    """[P] bool, true inside the segments."""
    mask = np.zeros(length, dtype=bool)
    for start, end in segments:
        mask[start:end] = True
    return mask


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Half-open contiguous runs of true values, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
