# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file with everything in it, to turn over layer by layer and head by head."""

import base64
import html
import importlib.resources
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_kvcompress.tools.explain_drawing import STOPS, TITLES, caption, summary
from vllm_kvcompress.tools.explain_record import MAPS, Column, Explanation

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 1600
"""Longest side of the image inside the page."""

UNKNOWN = 65535
"""Stands for a value that is not there; values are 0 to 65534."""


def page(explanation: Explanation) -> str:
    """The HTML. It loads nothing, and its own policy forbids it to."""
    template = importlib.resources.files(__package__).joinpath("explain.html").read_text("utf-8")
    # no text of the user's may end the element that it stands in
    data = json.dumps(page_data(explanation)).replace("<", "\\u003c")
    before, after = template.split("/*DATA*/")
    return before.replace("<!--QUESTION-->", html.escape(explanation.question)) + data + after


def page_data(explanation: Explanation) -> dict[str, Any]:
    """What the page's script draws, as JSON."""
    rows, columns = explanation.grid.cells
    return {
        "question": explanation.question,
        "model": explanation.model,
        "fullAnswer": explanation.full_answer,
        "image": _data_url(explanation.image),
        "size": [explanation.image.width, explanation.image.height],
        "rows": rows,
        "columns": columns,
        "stops": STOPS,
        "unknown": UNKNOWN,
        "methods": [_method(explanation, column) for column in explanation.columns],
    }


def _method(explanation: Explanation, column: Column) -> dict[str, Any]:
    prompt, coverage = column.prompt, column.prompt.coverage()
    kept = explanation.on_grid(prompt.kept)
    return {
        "title": column.title,
        "details": column.details,
        "answer": column.answer.strip(),
        "layers": prompt.layers,
        "heads": kept.shape[1],
        "length": prompt.length,
        "numVisual": int(prompt.is_visual.sum()),
        "summary": summary(column),
        "kept": _base64(kept.astype(np.uint8)),
        "maps": [
            {
                "title": TITLES[name],
                "caption": caption(name, prompt),
                **quantized(explanation.on_grid(prompt.maps[name])),
            }
            for name in MAPS
            if name in prompt.maps
        ],
        "tokens": coverage.tokens.tolist(),
        "visual": coverage.visual.tolist(),
        "attention": {
            name: np.round(share, 4).tolist() for name, share in coverage.attention.items()
        },
    }


def quantized(values: np.ndarray) -> dict[str, Any]:
    """Values [L, Hkv, rows, columns] as 16-bit steps between the limits of each layer and head.

    Returns:
        "low" and "high", L * Hkv limits each, and "steps", base64 of little-endian integers.
    """
    planes = values.reshape(-1, values.shape[2] * values.shape[3]).astype(np.float64)
    known = ~np.isnan(planes)
    low = np.where(known, planes, np.inf).min(1)
    high = np.where(known, planes, -np.inf).max(1)
    empty = ~known.any(1)
    low[empty] = high[empty] = 0.0
    span = np.where(high > low, high - low, 1.0)
    steps = np.rint((planes - low[:, None]) / span[:, None] * (UNKNOWN - 1))
    steps = np.where(known, steps, UNKNOWN).astype("<u2")
    return {"low": low.tolist(), "high": high.tolist(), "steps": _base64(steps)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _data_url(image: "Image.Image") -> str:
    shown = image.copy()
    shown.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
