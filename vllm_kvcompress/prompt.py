# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a prompt besides the settings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_TEXT_ROWS = 256
"""Most instruction rows that are looked at: bounds what must be kept over prefill chunks."""


@dataclass(frozen=True)
class PromptFacts:
    """Length and modality of a prompt.

    Attributes:
        length: P, in tokens after image expansion.
        visual: runs [start, end) of tokens that receive an image or video embedding, ascending; one
            per image, or per temporal patch of a video. Wrapper tokens are text.
    """

    length: int
    visual: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_runs(cls, length: int, runs: Sequence[tuple[int, int]]) -> "PromptFacts":
        """Runs in any order; those that touch are joined."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted(runs):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return cls(length, tuple(joined))

    def num_visual(self, end: int) -> int:
        """Visual tokens at positions below ``end``."""
        return sum(max(0, min(stop, end) - start) for start, stop in self.visual)

    def num_text_rows(self, window: int) -> int:
        """Rows of the instruction: the text after the last visual token, MAX_TEXT_ROWS at most.

        Without visual tokens the window; the last token when the prompt ends with an image.
        """
        if not self.visual:
            return min(window, self.length)
        return min(max(1, self.length - self.visual[-1][1]), MAX_TEXT_ROWS)

    def segments(self, size: int) -> np.ndarray:
        """[size] int64: index of the visual run at each position, -1 elsewhere."""
        found = np.full(size, -1, dtype=np.int64)
        for index, (start, end) in enumerate(self.visual):
            found[start:end] = index
        return found
