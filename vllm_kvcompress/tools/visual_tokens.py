# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt stand for which part of an image.

Source of the rules: SparseMM, arXiv 2506.05344, and its released code.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_kvcompress.tools.ocr_pages import Box


class Size(NamedTuple):
    """Height and width, in what the name of the variable says."""

    height: int
    width: int


@dataclass(frozen=True)
class TokenGrid:
    """The visual tokens of one image: a grid of cells, row by row.

        prompt:  ... first | columns tokens | newline? | columns tokens | newline? | ...

    Attributes:
        first: position in the prompt of the cell in the upper left corner.
        cells: rows and columns.
        stride: tokens from one row to the next.
        image: the image as it was drawn, in pixels.
        resized: the image that the cells divide, in pixels.
    """

    first: int
    cells: Size
    stride: int
    image: Size
    resized: Size

    def __post_init__(self) -> None:
        if min(self.cell) < 1:
            raise ValueError(
                f"an image of {self.resized.width} x {self.resized.height} pixels is too small for "
                f"{self.cells.width} x {self.cells.height} visual tokens"
            )

    @property
    def cell(self) -> Size:
        """Height and width of a cell in pixels of the resized image, rounded down."""
        return Size(
            self.resized.height // self.cells.height, self.resized.width // self.cells.width
        )

    def tokens_of(self, box: Box) -> list[int]:
        """Positions in the prompt of the cells that a box of the drawn image touches, ascending."""
        y, x = self.resized.height / self.image.height, self.resized.width / self.image.width
        rows = _span(box.top * y, box.bottom * y, self.cell.height, self.cells.height)
        columns = _span(box.left * x, box.right * x, self.cell.width, self.cells.width)
        return [self.first + row * self.stride + column for row in rows for column in columns]


def _span(start: float, end: float, cell: int, count: int) -> range:
    """Indices of the cells from that of `start` to that of `end`, less those outside [0, count)."""
    return range(max(int(start // cell), 0), min(int(end // cell) + 1, count))


def token_grid(config: Any, inputs: Mapping[str, Any], image: Size) -> TokenGrid:
    """The grid of the only image of a prompt.

    Args:
        config: of the model, from transformers.
        inputs: what the processor made of the prompt; "input_ids" [1, T] with all placeholders.
        image: as it was given to the processor, in pixels.

    Raises:
        ValueError: the model's visual tokens are not known here, or not where they should be.
    """
    require_known(config)
    ids = inputs["input_ids"][0].tolist()
    before, cells, stride, resized = _LAYOUTS[config.model_type](config, inputs, image)
    found, expected = ids.count(config.image_token_id), before + cells.height * stride
    if found != expected:
        raise ValueError(
            f"expected {expected} visual tokens for an image of {image.width} x {image.height} "
            f"pixels, got {found}: the processor does not fit a model of type {config.model_type!r}"
        )
    first = ids.index(config.image_token_id) + before
    return TokenGrid(first, cells, stride, image, resized)


def require_known(config: Any) -> None:
    """Raise ValueError unless it is known where this kind of model has its visual tokens."""
    if config.model_type not in _LAYOUTS:
        raise ValueError(
            f"expected a model of type {', '.join(_LAYOUTS)}, got {config.model_type!r}: it is not "
            "known which of its tokens stand for which part of an image"
        )


_Layout = tuple[int, Size, int, Size]
"""Visual tokens before the grid, rows and columns, stride, resized image in pixels."""


def _qwen(config: Any, inputs: Mapping[str, Any], image: Size) -> _Layout:
    """A grid of patches, of which `merge` x `merge` become a token."""
    vision = config.vision_config
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = vision.spatial_merge_size
    cells = Size(rows // merge, columns // merge)
    return 0, cells, cells.width, Size(rows * vision.patch_size, columns * vision.patch_size)


def _llava_next(config: Any, inputs: Mapping[str, Any], image: Size) -> _Layout:
    """A view of the whole image, then a grid of tiles without padding, a newline after each row.

    Only the grid counts. Its cells divide the drawn image.
    """
    side, cells = _llava_grid(config, image)
    return side * side, cells, cells.width + 1, image


def _llava_onevision(config: Any, inputs: Mapping[str, Any], image: Size) -> _Layout:
    """The same; a grid of more cells than so many tiles have is shrunk."""
    side, cells = _llava_grid(config, image)
    max_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(cells.height * cells.width / (max_tiles * side**2))
    if ratio > 1.1:
        cells = Size(int(cells.height // ratio), int(cells.width // ratio))
    return side * side, cells, cells.width + 1, image


def _llava_grid(config: Any, image: Size) -> tuple[int, Size]:
    """Cells per side of a tile, and of all tiles less what padding covers."""
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    height, width = select_best_resolution(image, config.image_grid_pinpoints)
    rows, columns = height // tile * side, width // tile * side
    if image.width / image.height > columns / rows:
        inside = int(round(image.height * (columns / image.width), 7))
        rows -= (rows - inside) // 2 * 2
    else:
        inside = int(round(image.width * (rows / image.height), 7))
        columns -= (columns - inside) // 2 * 2
    return side, Size(rows, columns)


_LAYOUTS: dict[str, Callable[[Any, Mapping[str, Any], Size], _Layout]] = {
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
}
