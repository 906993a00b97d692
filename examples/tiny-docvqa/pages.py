# SPDX-License-Identifier: Apache-2.0
"""Synthetic pages of labelled codes, with a question about one of them.

    python pages.py --out DIR --count 3

A page is a square grid of cells; each cell is 28 x 28 pixels, which Qwen2-VL turns into exactly one
visual token. Records `A B : d d d d` occupy seven neighbouring cells; every other cell is blank, a
texture or a stray glyph. The model in `model/` was trained on pages drawn like this, so sizes,
font and noise below are part of its input format and not a matter of taste.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 28  # pixels; patch 14 x spatial merge 2
FONT_SIZE = 24
CODE_DIGITS = 4
RECORD_CELLS = 2 + 1 + CODE_DIGITS  # label, colon, code

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
GLYPHS = LETTERS + DIGITS + ":" + "+-*/=#%&$@<>()!;~^"
BLANK = " "
TEXTURE = "?"  # not a glyph: stands for a cell of random blots

TEXTURE_SHARE = 0.3  # of the cells that are not blank
CONFUSABLE_SHARE = 0.5  # of the pages draw all labels from six letters
QUESTION = (
    "Find record {label} on this page and read its code. Answer with the digits of the code only, "
    "no words, no spaces, no units and no explanation please."
)


class Page(NamedTuple):
    """One rendered page and one question about it."""

    image: Image.Image  # RGB, [28 * cells, 28 * cells] pixels
    question: str
    answer: str  # four digits
    words: list[dict[str, Any]]  # "text" and "box" (in pixels) of each digit of the answer


def make_page(
    seed: int, *, cells: int = 18, records: int = 9, fill: float = 0.7, vertical: bool = False
) -> Page:
    """Draw the page that belongs to `seed`; the question asks for its first record.

    Args:
        seed: everything random follows from it.
        cells: side of the page in cells (= visual tokens); the model was trained up to 18.
        records: number of records, at most one per line of the page.
        fill: share of the cells outside records that are not blank.
        vertical: write records downwards, so that neighbours in a record are `cells` tokens apart.
            The model in `model/` has never seen such pages and answers none of them correctly.

    Raises:
        ValueError: the page is too small for a record or for that many of them.
    """
    if cells < RECORD_CELLS:
        raise ValueError(f"cells: expected at least {RECORD_CELLS}, got {cells}")
    if not 1 <= records <= cells:
        raise ValueError(f"records: expected 1 to {cells} (one per line), got {records}")
    rng = np.random.default_rng(seed)
    labels = draw_labels(rng, records)
    codes = ["".join(rng.choice(list(DIGITS), CODE_DIGITS)) for _ in range(records)]
    grid = _draw_background(rng, cells, fill)
    lines = rng.permutation(cells)[:records]
    starts = [
        write_record(rng, grid[line], f"{label}:{code}", fill)
        for line, label, code in zip(lines, labels, codes, strict=True)
    ]
    pixels = render(rng, grid.T if vertical else grid)
    first = starts[0] + RECORD_CELLS - CODE_DIGITS
    places = [(lines[0], first + digit) for digit in range(CODE_DIGITS)]
    words = [
        {"text": digit, "box": _inside(*(place[::-1] if vertical else place))}
        for digit, place in zip(codes[0], places, strict=True)
    ]
    image = Image.fromarray(pixels).convert("RGB")
    return Page(image, QUESTION.format(label=labels[0]), codes[0], words)


def _inside(row: int, column: int) -> list[int]:
    """Left, top, right and bottom pixel of a cell, a little less on all sides."""
    left, top = CELL * int(column), CELL * int(row)
    return [left + 2, top + 2, left + CELL - 3, top + CELL - 3]


def draw_labels(rng: np.random.Generator, count: int) -> list[str]:
    """`count` distinct two-letter labels."""
    confusable = rng.random() < CONFUSABLE_SHARE and count <= 36
    alphabet = rng.permutation(list(LETTERS))[: 6 if confusable else len(LETTERS)]
    pairs = rng.choice(len(alphabet) ** 2, count, replace=False)
    return [alphabet[pair // len(alphabet)] + alphabet[pair % len(alphabet)] for pair in pairs]


def _draw_background(rng: np.random.Generator, cells: int, fill: float) -> np.ndarray:
    """Grid of characters without records: stray glyphs, textures, blanks. `[cells, cells]`"""
    grid = rng.choice(list(GLYPHS), (cells, cells))
    kind = rng.random((cells, cells))
    grid[kind < fill * TEXTURE_SHARE] = TEXTURE
    grid[kind >= fill] = BLANK
    return grid


def write_record(rng: np.random.Generator, line: np.ndarray, text: str, fill: float) -> int:
    """Put `text` somewhere into `line` (`[cells]`, in place), with a quiet cell on both sides.

    Returns:
        the cell in which it begins.
    """
    start = rng.integers(len(line) - len(text) + 1)
    end = start + len(text)
    line[start:end] = list(text)
    # a stray letter or digit next to a record would read as a part of it
    for neighbour in (start - 1, end):
        if 0 <= neighbour < len(line):
            line[neighbour] = TEXTURE if rng.random() < fill else BLANK
    return int(start)


def render(rng: np.random.Generator, grid: np.ndarray) -> np.ndarray:
    """Grid of characters to grey pixels, `[rows, cols]` to uint8 `[rows * 28, cols * 28]`.

    Each cell has its own paper brightness and contrast; the whole page has pixel noise.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    glyph_ink = {character: _glyph_ink(character, font) for character in GLYPHS}
    page = np.empty((grid.shape[0] * CELL, grid.shape[1] * CELL), np.uint8)
    for (row, col), character in np.ndenumerate(grid):
        contrast = rng.uniform(0.6, 1.0)
        if character == TEXTURE:
            ink = _texture_ink(rng)
            contrast *= 0.5
        elif character == BLANK:
            ink = np.zeros((CELL, CELL))
        else:
            ink = glyph_ink[character]
        grey = rng.uniform(215, 255) * (1 - contrast * ink) + rng.normal(0, 10, (CELL, CELL))
        top, left = row * CELL, col * CELL
        page[top : top + CELL, left : left + CELL] = grey.clip(0, 255).round()
    return page


def _glyph_ink(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Coverage of one centred glyph, `[28, 28]` in 0..1."""
    cell = Image.new("L", (CELL, CELL), 0)
    draw = ImageDraw.Draw(cell)
    left, top, right, bottom = draw.textbbox((0, 0), character, font=font)
    corner = ((CELL - left - right) / 2, (CELL - top - bottom) / 2)
    draw.text(corner, character, fill=255, font=font)
    return np.asarray(cell, np.float64) / 255


def _texture_ink(rng: np.random.Generator) -> np.ndarray:
    """Random blots of 4 x 4 pixels, `[28, 28]` of 0 or 1."""
    blots = rng.random((CELL // 4, CELL // 4)) < 0.35
    return blots.repeat(4, axis=0).repeat(4, axis=1).astype(np.float64)


def main() -> None:
    """Write pages as PNG files and their questions and answers as `questions.json`."""
    parser = argparse.ArgumentParser(description="Generate pages with questions and answers.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first page")
    parser.add_argument(
        "--vertical",
        action="store_true",
        help="write records downwards (the shipped model cannot read these)",
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(args.seed, args.seed + args.count):
        page = make_page(seed, vertical=args.vertical)
        name = f"page-{seed}.png"
        page.image.save(args.out / name)
        entries.append(page._asdict() | {"image": name})
    (args.out / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
