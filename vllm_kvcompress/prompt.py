# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a prompt besides the config."""

import itertools
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
        widths: visual tokens in a row of each of them, 0 where that is not known; empty when none
            is.
    """

    length: int
    visual: tuple[Run, ...] = ()
    items: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()

    @classmethod
    def from_items(
        cls, length: int, items: Iterable[Sequence[Run]], widths: Iterable[int] | None = None
    ) -> "PromptFacts":
        """From the runs of every image or temporal patch, both in any order.

        Args:
            widths: of each item's rows, 0 where that is not known.
        """
        items = list(items)
        known = [0] * len(items) if widths is None else widths
        pairs = zip(items, known, strict=True)
        ordered = sorted((sorted(item), width) for item, width in pairs if item)
        runs = sorted((run, number) for number, (item, _) in enumerate(ordered) for run in item)
        found = tuple(width for _, width in ordered)
        return cls(
            length,
            tuple(run for run, _ in runs),
            tuple(number for _, number in runs),
            found if any(found) else (),
        )

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

    def grids(self, count: int) -> np.ndarray:
        """[count, 4] int64 of each image or temporal patch: first position, end, width, step.

        Rows of ``width`` tokens begin every ``step`` positions; a model may put text between them.
        All 0 where the width is not known, where tokens do not stand so, and past the last one.
        """
        found = np.zeros((count, 4), dtype=np.int64)
        if not self.widths:
            return found
        members: dict[int, list[Run]] = {}
        for number, run in zip(self.items or range(len(self.visual)), self.visual, strict=True):
            members.setdefault(number, []).append(run)
        for number, runs in members.items():
            width = self.widths[number]
            step = _row_step(runs, width) if width else 0
            if step:
                found[number] = runs[0][0], runs[-1][1], width, step
        return found


def _row_step(runs: Sequence[Run], width: int) -> int:
    """Positions from one row of an image to the next; 0 if its runs are no such rows."""
    if len(runs) == 1:
        return 0 if (runs[0][1] - runs[0][0]) % width else width
    steps = {after[0] - before[0] for before, after in itertools.pairwise(runs)}
    lengths = {end - start for start, end in runs}
    return steps.pop() if len(steps) == 1 and lengths == {width} else 0


def split_evenly(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """Runs of a video as those of its temporal patches, which have equally many tokens each."""
    tokens = np.concatenate([np.arange(start, end) for start, end in runs])
    found = []
    for part in np.array_split(tokens, parts):
        pieces = np.split(part, np.flatnonzero(np.diff(part) > 1) + 1)
        found.append([(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if piece.size])
    return found
