# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a prompt besides the config."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_INSTRUCTION_LEN = 256
"""Most instruction tokens whose queries are looked at: bounds what prompts keep over chunks."""


Run = tuple[int, int]
"""Positions [start, end)."""


@dataclass(frozen=True)
class PromptFacts:
    """Length and modality of a prompt.

    Attributes:
        length: P, in tokens after image expansion.
        visual: runs [start, end) of tokens that receive an image or video embedding, ascending.
            Wrapper tokens are text.
        items: image, or temporal patch of a video, that each run belongs to, counted from 0; empty
            when every run is one of its own.
    """

    length: int
    visual: tuple[Run, ...] = ()
    items: tuple[int, ...] = ()

    @classmethod
    def from_items(cls, length: int, items: Iterable[Sequence[Run]]) -> "PromptFacts":
        """From the runs of every image or temporal patch, both in any order."""
        ordered = sorted(sorted(item) for item in items if item)
        runs = sorted((run, number) for number, item in enumerate(ordered) for run in item)
        return cls(length, tuple(run for run, _ in runs), tuple(number for _, number in runs))

    def num_visual(self, end: int) -> int:
        """Visual tokens at positions below ``end``."""
        return sum(max(0, min(stop, end) - start) for start, stop in self.visual)

    def num_instruction_tokens(self, window: int) -> int:
        """Tokens of the instruction: the text after the last visual token.

        At most MAX_INSTRUCTION_LEN. Without visual tokens the window; the last token when the
        prompt ends with an image.
        """
        if not self.visual:
            return min(window, self.length)
        return min(max(1, self.length - self.visual[-1][1]), MAX_INSTRUCTION_LEN)

    def segments(self, size: int) -> np.ndarray:
        """[size] int64: image or temporal patch at each position, -1 on text."""
        found = np.full(size, -1, dtype=np.int64)
        numbers = self.items or range(len(self.visual))
        for number, (start, end) in zip(numbers, self.visual, strict=True):
            found[start:end] = number
        return found


def split_evenly(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """Runs of a video as those of its temporal patches, which have equally many tokens each."""
    tokens = np.concatenate([np.arange(start, end) for start, end in runs])
    found = []
    for part in np.array_split(tokens, parts):
        pieces = np.split(part, np.flatnonzero(np.diff(part) > 1) + 1)
        found.append([(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if piece.size])
    return found
