# SPDX-License-Identifier: Apache-2.0
"""A made-up compressed prompt whose maps and kept sets are known."""

import base64
import io

import numpy as np
from PIL import Image

from vllm_kvcompress.tools.explain_record import Column, Explanation, PromptMaps
from vllm_kvcompress.tools.visual_tokens import Size, TokenGrid

LAYERS, HEADS, LENGTH, ROWS, COLUMNS = 2, 2, 24, 3, 4
FIRST, STRIDE = 3, COLUMNS + 1  # a newline after each row, as LLaVA has it
VISUAL = ((FIRST, FIRST + ROWS * STRIDE),)
IMAGE_SIZE = (80, 60)
QUESTION = "Which </script><b>row</b> & column?"


def grid() -> TokenGrid:
    size = Size(IMAGE_SIZE[1], IMAGE_SIZE[0])
    return TokenGrid(FIRST, Size(ROWS, COLUMNS), STRIDE, size, size)


def cell(row: int, column: int) -> int:
    """Position in the prompt."""
    return FIRST + row * STRIDE + column


def arrays() -> dict[str, np.ndarray]:
    """Head (l, h) keeps the text behind the image, and the first l + h + 1 cells of row 0."""
    kept = np.zeros((LAYERS, HEADS, LENGTH), dtype=bool)
    kept[..., VISUAL[0][1] :] = True
    for layer in range(LAYERS):
        for head in range(HEADS):
            kept[layer, head, cell(0, 0) : cell(0, layer + head + 1)] = True
    rng = np.random.default_rng(0)
    shape = (LAYERS, HEADS, LENGTH)
    found = {name: rng.random(shape, dtype=np.float32) for name in ("last", "evidence")}
    found |= {name: rng.random(shape, dtype=np.float32) for name in ("coherence", "persistence")}
    window = np.zeros(shape, dtype=np.float32)
    window[..., cell(0, 0)], window[..., cell(2, 3)] = 3.0, 1.0
    final = rng.random(shape, dtype=np.float32) - 0.5
    final[..., -4:] = -np.inf
    return {"kept": kept, "window": window, "final": final, **found}


def report(heads: list[int], method: str = "bacon", drop: tuple[str, ...] = ()) -> dict:
    """What a worker with these heads says."""
    buffer = io.BytesIO()
    own = {name: array[:, heads] for name, array in arrays().items() if name not in drop}
    np.savez_compressed(buffer, **own)
    return {
        "config": {"method": method, "budget": 8, "window": 4},
        "length": LENGTH,
        "visual": [list(run) for run in VISUAL],
        "layers": [1, 3],
        "heads": heads,
        "block_size": 4,
        "arrays": base64.b64encode(buffer.getvalue()).decode(),
    }


def picture() -> Image.Image:
    """Black, so that what is veiled is much brighter."""
    return Image.new("RGB", IMAGE_SIZE, (0, 0, 0))


def explanation(*columns: Column, full_answer: str | None = None) -> Explanation:
    return Explanation("some/model", picture(), QUESTION, grid(), columns, full_answer)


def column(method: str = "bacon", drop: tuple[str, ...] = ()) -> Column:
    prompt = PromptMaps.from_reports([report([0, 1], method, drop)])
    return Column(f"{method}, budget 8 tokens", "details", " 42 ", prompt)
