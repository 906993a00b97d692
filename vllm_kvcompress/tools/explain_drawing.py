# SPDX-License-Identifier: Apache-2.0
"""The picture: what is kept, and the maps behind it, over the image.

Imports Pillow only where it is used: the command line must start quickly.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.tools.explain_record import MAPS, Column, Explanation, PromptMaps

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

STOPS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128),
    (94, 201, 98), (173, 220, 48), (253, 231, 37),
)  # fmt: skip
"""Viridis, which people with any colour vision read as dark to bright; equally far apart."""

TITLES = {
    "window": "Window",
    "last": "Last query",
    "evidence": "Evidence",
    "coherence": "Coherence",
    "persistence": "Persistence",
    "final": "Final score",
}
_CAPTIONS = {
    "window": "mean attention of the last {window} prompt tokens",
    "last": "attention of the very last prompt token",
    "evidence": "what the last token sees more of",
    "coherence": "evidence around each token",
    "persistence": "evidence in earlier layers",
    "final": "ranks the tokens: the best are kept",
}
PAPER, INK, FAINT, LINE = (255, 255, 255), (24, 28, 34), (96, 104, 116), (214, 219, 226)
VEIL = (236, 238, 241)

WIDTH, MARGIN, GAP = 760, 32, 24
"""Of a column, around everything and between columns, in pixels."""


def caption(name: str, prompt: PromptMaps) -> str:
    """What a map shows, in one line."""
    config = KVCompressionConfig.parse(prompt.config)
    text = _CAPTIONS[name].format(window=config.window)
    used = {"window", "last", "final"}
    if isinstance(config.scoring, Bacon):
        used |= {"e": {"evidence"}, "el": {"evidence", "coherence"}}.get(
            config.scoring.mode, set(MAPS)
        )
    return text if name in used else f"{text}; {config.scorer} does not use it"


def heat(values: np.ndarray) -> np.ndarray:
    """Colours [..., 3] uint8 of values in [0, 1]; NaN is white."""
    stops = np.array(STOPS, dtype=np.float64)
    places = np.clip(np.nan_to_num(values), 0, 1) * (len(stops) - 1)
    low = np.minimum(places.astype(int), len(stops) - 2)
    part = (places - low)[..., None]
    colours = stops[low] * (1 - part) + stops[low + 1] * part
    colours[np.isnan(values)] = 255
    return colours.round().astype(np.uint8)


def scaled(values: np.ndarray) -> np.ndarray:
    """Values [..., rows, columns] as places in [0, 1] on the colour scale, NaN as it is.

    From 0 to the largest with the square root, so that one bright token does not hide the others;
    evenly from the smallest where there are negative ones.
    """
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    if high <= low:
        return np.where(np.isnan(values), np.nan, 0.0)
    if low < 0:
        return (values - low) / (high - low)
    return np.sqrt(values / high)


def over_image(image: "Image.Image", cells: np.ndarray, size: tuple[int, int]) -> "Image.Image":
    """The image in grey, tinted by colours [rows, columns, 3]."""
    from PIL import Image

    tint = np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.NEAREST), np.float64)
    grey = np.asarray(image.convert("L").resize(size), np.float64)[..., None]
    return Image.fromarray((tint * (0.55 + 0.45 * grey / 255)).round().astype(np.uint8))


def kept_on_image(image: "Image.Image", share: np.ndarray, size: tuple[int, int]) -> "Image.Image":
    """The image where tokens are kept, veiled where none is.

    Args:
        share: [rows, columns] in [0, 1], by how many of the heads each token is kept.
    """
    from PIL import Image

    clear = Image.fromarray((255 * np.sqrt(share)).round().astype(np.uint8))
    clear = clear.resize(size, Image.Resampling.NEAREST)
    seen = image.convert("RGB").resize(size)
    veiled = Image.blend(seen, Image.new("RGB", size, VEIL), 0.82)
    tinted = Image.blend(seen, over_image(image, heat(np.sqrt(share)), size), 0.5)
    return Image.composite(tinted, veiled, clear)


def fit(image: "Image.Image", width: int, height: int) -> tuple[int, int]:
    """The largest size of the image's shape that fits."""
    scale = min(width / image.width, height / image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def summary(column: Column) -> list[tuple[str, str]]:
    """What a column comes to, in a few numbers: label and value."""
    prompt, coverage = column.prompt, column.prompt.coverage()
    num_visual = int(prompt.is_visual.sum())
    anywhere = int(prompt.kept[..., prompt.is_visual].any((0, 1)).sum())
    lines = [
        ("tokens kept per head", f"{_span(coverage.tokens)} of {prompt.length}"),
        ("visual tokens kept per head", f"{_span(coverage.visual)} of {num_visual}"),
        ("visual tokens that some head keeps", f"{anywhere} of {num_visual}"),
    ]
    names = {"window": "window", "last": "last query"}
    lines += [
        (f"attention of the {names[name]} to the image that is kept", f"{share.mean():.0%}")
        for name, share in coverage.attention.items()
    ]
    return lines


def _span(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{counts.mean():.1f} ({low} to {high})"


class _Pen(NamedTuple):
    """Draws text downwards."""

    draw: "ImageDraw.ImageDraw"

    def write(
        self, x: float, y: float, text: str, size: int, width: int, colour: tuple[int, ...] = INK
    ) -> float:
        """Wrapped text; returns where the next line begins."""
        from PIL import ImageFont

        font = ImageFont.load_default(size)
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                self.draw.text((x, y), line, fill=colour, font=font)
                y, longer = y + 1.4 * size, word
            line = longer
        self.draw.text((x, y), line, fill=colour, font=font)
        return y + 1.4 * size


def draw(explanation: Explanation) -> "Image.Image":
    """The whole picture, columns side by side."""
    from PIL import Image, ImageDraw

    num = len(explanation.columns)
    width = num * WIDTH + (num - 1) * GAP + 2 * MARGIN
    # as tall as it can get, and cut at the end
    tallest = 4000 + 200 * max(len(column.prompt.layers) for column in explanation.columns)
    canvas = Image.new("RGB", (width, tallest), PAPER)
    pen = _Pen(ImageDraw.Draw(canvas))
    inside = width - 2 * MARGIN
    y = pen.write(MARGIN, MARGIN, "What the KV cache keeps", 30, inside)
    y = pen.write(MARGIN, y + 4, explanation.question, 20, inside)
    y = pen.write(MARGIN, y + 2, f"Model: {explanation.model}", 16, inside, FAINT)
    if explanation.full_answer is not None:
        text = f"Answer without compression: {explanation.full_answer.strip()}"
        y = pen.write(MARGIN, y, text, 16, inside, FAINT)
    y += 16
    ends = []
    for index, column in enumerate(explanation.columns):
        x = MARGIN + index * (WIDTH + GAP)
        ends.append(_draw_column(canvas, pen, explanation, column, x, y))
    return canvas.crop((0, 0, width, round(max(ends)) + MARGIN))


def _draw_column(
    canvas: "Image.Image", pen: _Pen, explanation: Explanation, column: Column, x: int, y: float
) -> float:
    prompt = column.prompt
    pen.draw.line((x, y, x + WIDTH, y), fill=LINE, width=2)
    y = pen.write(x, y + 12, column.title, 24, WIDTH)
    y = pen.write(x, y, f"Answer: {column.answer.strip()}", 20, WIDTH) + 8
    kept = explanation.on_grid(prompt.kept)
    size = fit(explanation.image, WIDTH, WIDTH)
    canvas.paste(kept_on_image(explanation.image, kept.mean((0, 1)), size), (x, round(y)))
    y = _draw_legend(canvas, pen, kept.shape[0] * kept.shape[1], x, y + size[1] + 10)
    for label, value in summary(column):
        pen.write(x, y, label, 16, WIDTH, FAINT)
        y = pen.write(x + 0.66 * WIDTH, y, value, 16, WIDTH)
    y = pen.write(x, y + 14, "How tokens score", 20, WIDTH) + 4
    y = _draw_maps(canvas, pen, explanation, column, x, y)
    y = pen.write(x, y + 10, "What each layer and KV head keeps", 20, WIDTH) + 4
    return _draw_heads(canvas, pen, explanation, column, x, y)


def _draw_legend(canvas: "Image.Image", pen: _Pen, num: int, x: int, y: float) -> float:
    """How colours say by how many heads a token is kept."""
    from PIL import Image

    shares = np.linspace(0, 1, 220)
    veiled = shares < 0.5 / num
    bar = np.where(veiled[:, None], VEIL, heat(np.sqrt(shares))).astype(np.uint8)
    canvas.paste(Image.fromarray(np.repeat(bar[None], 14, axis=0)), (x, round(y)))
    text = f"kept by none (veiled) to all {num} heads of all layers"
    return pen.write(x + 232, y - 1, text, 14, WIDTH - 232, FAINT) + 6


def _draw_maps(
    canvas: "Image.Image", pen: _Pen, explanation: Explanation, column: Column, x: int, y: float
) -> float:
    prompt = column.prompt
    names = [name for name in MAPS if name in prompt.maps]
    wide = (WIDTH - 2 * 16) // 3
    size = fit(explanation.image, wide, 300)
    bottom = y
    for index, name in enumerate(names):
        left, top = x + index % 3 * (wide + 16), y + index // 3 * (size[1] + 74)
        mean = explanation.on_grid(prompt.maps[name]).mean((0, 1), dtype=np.float64)
        picture = over_image(explanation.image, heat(scaled(mean)), size)
        canvas.paste(picture, (round(left), round(top)))
        below = pen.write(left, top + size[1] + 4, TITLES[name], 16, wide)
        pen.write(left, below, caption(name, prompt), 13, wide, FAINT)
        bottom = top + size[1] + 66
    text = "Mean over layers and heads; dark is low, bright is high, on a scale of each map's own."
    return pen.write(x, bottom + 4, text, 14, WIDTH, FAINT)


def _draw_heads(
    canvas: "Image.Image", pen: _Pen, explanation: Explanation, column: Column, x: int, y: float
) -> float:
    prompt = column.prompt
    kept = explanation.on_grid(prompt.kept)
    num_heads, label = kept.shape[1], 64
    wide = min(150, (WIDTH - label) // num_heads - 8)
    size = fit(explanation.image, wide, 160)
    block = label + num_heads * (wide + 8)
    abreast = max(1, WIDTH // block)
    for index, layer in enumerate(prompt.layers):
        left, top = x + index % abreast * block, y + index // abreast * (size[1] + 10) + 20
        pen.write(left, top, f"layer {layer}", 13, label, FAINT)
        for head in range(num_heads):
            place = left + label + head * (wide + 8)
            if index < abreast:
                pen.write(place, y, f"head {head}", 13, wide, FAINT)
            picture = kept_on_image(explanation.image, kept[index, head].astype(float), size)
            canvas.paste(picture, (place, round(top)))
    return y + 20 + -(-len(prompt.layers) // abreast) * (size[1] + 10)
