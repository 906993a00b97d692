# SPDX-License-Identifier: Apache-2.0
"""Pages on which no cheap rule keeps the answer: stray digits, both directions, several images.

Drawn with the parts of ``examples/tiny-docvqa/pages.py``, whose own pages hold so few digits that a
score which knows nothing of the question can keep all of them.
"""

import sys
from typing import NamedTuple

import numpy as np
from PIL import Image
from serving import ROOT

sys.path.append(str(ROOT / "examples" / "tiny-docvqa"))
import pages

QUESTION_LATE = (
    "Read one code on this page. Answer with the digits of the code only, no words, no spaces, no "
    "units and no explanation please. The record is {label}."
)
"""The label stands at the end of the prompt, in the window of every method."""


class Layout(NamedTuple):
    """What a prompt looks like.

    Attributes:
        direction: "rows", "columns", or "" for either, image by image.
        images: of one prompt; the answer is in the last one.
        side: of an image in cells, each one visual token.
        records: per image.
        digits: share of the stray glyphs that are digits.
        late: the question ends with the label.
    """

    direction: str = ""
    images: int = 1
    side: int = 18
    records: int = 9
    digits: float = 0.5
    late: bool = False


class PageQuestion(NamedTuple):
    """Images, and a question about the last of them."""

    images: list[Image.Image]
    question: str
    answer: str


def draw(rng: np.random.Generator, layout: Layout, labels: list[str], codes: list[str]) -> Image:
    """One image with these records."""
    side, fill = layout.side, 0.7
    grid = rng.choice(list(pages.GLYPHS), (side, side))
    stray = rng.random((side, side)) < layout.digits
    grid[stray] = rng.choice(list(pages.DIGITS), (side, side))[stray]
    kind = rng.random((side, side))
    grid[kind < fill * pages.TEXTURE_SHARE] = pages.TEXTURE
    grid[kind >= fill] = pages.BLANK
    lines = rng.permutation(side)[: layout.records]
    for line, label, code in zip(lines, labels, codes, strict=True):
        pages.write_record(rng, grid[line], f"{label}:{code}", fill)
    upright = layout.direction == "columns" or (not layout.direction and rng.random() < 0.5)
    pixels = pages.render(rng, grid.T if upright else grid)
    return Image.fromarray(pixels).convert("RGB")


def make(seed: int, layout: Layout) -> PageQuestion:
    """The question that belongs to `seed`, always the same for a layout."""
    rng = np.random.default_rng(seed)
    count = layout.images * layout.records
    labels = pages.draw_labels(rng, count)
    codes = ["".join(rng.choice(list(pages.DIGITS), pages.CODE_DIGITS)) for _ in labels]
    parts = [slice(i * layout.records, (i + 1) * layout.records) for i in range(layout.images)]
    images = [draw(rng, layout, labels[part], codes[part]) for part in parts]
    asked = parts[-1].start
    text = QUESTION_LATE if layout.late else pages.QUESTION
    return PageQuestion(images, text.format(label=labels[asked]), codes[asked])
