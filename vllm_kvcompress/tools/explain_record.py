# SPDX-License-Identifier: Apache-2.0
"""What was kept of a prompt and why, as arrays on the image's grid, and in a few numbers.

Imports nothing but numpy.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vllm_kvcompress.tools.visual_tokens import TokenGrid

if TYPE_CHECKING:
    from PIL import Image

MAPS = ("window", "last", "evidence", "coherence", "persistence", "final")
"""Heat maps in the order in which they are read; a method that has no use for one lacks it."""


@dataclass(frozen=True)
class PromptMaps:
    """One compressed prompt; L layers, Hkv heads of the model, P tokens.

    Attributes:
        config: how it was compressed, as ``KVCompressionConfig.parse`` reads it.
        length: P.
        visual: runs [start, end) of visual tokens.
        layers: indices in the model of the L layers.
        block_size: tokens per block.
        kept: [L, Hkv, P] bool, what each head still attends to.
        maps: by name of ``MAPS``, each [L, Hkv, P] float32; NaN where nothing competes.
    """

    config: dict[str, Any]
    length: int
    visual: tuple[tuple[int, int], ...]
    layers: tuple[int, ...]
    block_size: int
    kept: np.ndarray
    maps: dict[str, np.ndarray]

    @classmethod
    def from_reports(cls, reports: Sequence[Mapping[str, Any] | None]) -> "PromptMaps":
        """From what the workers of an engine say, each of the KV heads it holds.

        Raises:
            ValueError: the prompt was not compressed.
        """
        given = [report for report in reports if report is not None]
        if not given:
            raise ValueError(
                "the prompt was not compressed: either it has no full block more than the budget "
                "keeps (lower the budget, or take a larger image), or the answer ended with its "
                "first token"
            )
        by_head: dict[int, dict[str, np.ndarray]] = {}
        for report in given:
            with np.load(io.BytesIO(base64.b64decode(report["arrays"]))) as archive:
                arrays = {name: archive[name] for name in archive.files}
            for index, head in enumerate(report["heads"]):  # ranks with the same head agree
                by_head[head] = {name: array[:, index] for name, array in arrays.items()}
        heads = [by_head[head] for head in sorted(by_head)]
        merged = {name: np.stack([head[name] for head in heads], axis=1) for name in heads[0]}
        first = given[0]
        maps = {
            name: np.where(np.isfinite(merged[name]), merged[name], np.nan)
            for name in MAPS
            if name in merged
        }
        return cls(
            config=dict(first["config"]),
            length=int(first["length"]),
            visual=tuple((int(start), int(end)) for start, end in first["visual"]),
            layers=tuple(int(layer) for layer in first["layers"]),
            block_size=int(first["block_size"]),
            kept=merged["kept"].astype(bool),
            maps=maps,
        )

    @property
    def is_visual(self) -> np.ndarray:
        """[P] bool."""
        marks = np.zeros(self.length, dtype=bool)
        for start, end in self.visual:
            marks[start:end] = True
        return marks

    def coverage(self) -> "Coverage":
        """How much each head keeps, and of what."""
        visual = self.is_visual
        shares: dict[str, np.ndarray] = {}
        for name in ("window", "last"):
            if name in self.maps:
                shares[name] = _share(self.maps[name][..., visual], self.kept[..., visual])
        return Coverage(self.kept.sum(2), self.kept[..., visual].sum(2), shares)


class Coverage(NamedTuple):
    """Numbers of every layer and head, all [L, Hkv].

    Attributes:
        tokens, visual: kept prompt tokens, and the visual ones among them.
        attention: by "window" and "last": which share of the attention that these rows pay to the
            image goes to tokens that are kept; for methods that look at the window.
    """

    tokens: np.ndarray
    visual: np.ndarray
    attention: dict[str, np.ndarray]


def _share(attention: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Share of the attention [..., X] that is paid to the kept ones."""
    total = attention.sum(-1, dtype=np.float64)
    held = np.where(kept, attention, 0.0).sum(-1, dtype=np.float64)
    return np.divide(held, total, out=np.ones_like(total), where=total > 0)


@dataclass(frozen=True)
class Column:
    """One way to compress the prompt.

    Attributes:
        title: method, budget and window, in words.
        details: options and where it ran.
        answer: to the question.
        prompt: what was kept, and why.
    """

    title: str
    details: str
    answer: str
    prompt: PromptMaps


@dataclass(frozen=True)
class Explanation:
    """Everything that a page or a picture shows.

    Attributes:
        model: name or folder of the checkpoint.
        image: as it was asked about.
        question: about it.
        grid: where on the image each visual token lies.
        columns: one, or two to compare.
        full_answer: without compression; None if it was not asked for.
    """

    model: str
    image: "Image.Image"
    question: str
    grid: TokenGrid
    columns: tuple[Column, ...]
    full_answer: str | None = None

    def on_grid(self, per_token: np.ndarray) -> np.ndarray:
        """[..., P] as [..., rows, columns of the grid]."""
        rows, columns = self.grid.cells
        positions = self.grid.first + self.grid.stride * np.arange(rows)[:, None]
        return per_token[..., positions + np.arange(columns)]
