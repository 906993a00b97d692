# SPDX-License-Identifier: Apache-2.0
"""Where on the image the visual tokens of an engine's prompt lie.

Imports transformers only where it is used: the command line must start quickly.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.tools.visual_tokens import Size, TokenGrid, require_known, token_grid

if TYPE_CHECKING:
    from PIL import Image

Runs = Sequence[tuple[int, int]]
"""Visual tokens of a prompt, [start, end) each."""

ADVICE = "give the rows and columns of its visual tokens with --grid ROWSxCOLUMNS"


def parse_cells(text: str) -> Size:
    """Read ``ROWSxCOLUMNS``.

    Raises:
        ValueError: not two positive numbers.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    if found is None or "0" in found.groups():
        raise ValueError(f"expected ROWSxCOLUMNS such as 18x24, got {text!r}")
    return Size(int(found[1]), int(found[2]))


def given_grid(cells: Size, image: Size, runs: Runs) -> TokenGrid:
    """A grid of so many cells that starts with the first visual token, row by row.

    Raises:
        ValueError: the prompt has another number of visual tokens.
    """
    count = sum(end - start for start, end in runs)
    if count != cells.height * cells.width:
        raise ValueError(
            f"--grid {cells.height}x{cells.width} is for {cells.height * cells.width} visual "
            f"tokens, and the prompt has {count}"
        )
    grid = TokenGrid(runs[0][0], cells, cells.width, image, image)
    _require_inside(grid, runs)
    return grid


def known_grid(
    model: str,
    messages: Sequence[Mapping[str, Any]],
    image: "Image.Image",
    runs: Runs,
    processor_kwargs: Mapping[str, Any],
) -> TokenGrid:
    """The grid that the checkpoint's own processor makes of the only image.

    Args:
        messages: the chat that the engine was given.
        runs: where the engine's prompt has its visual tokens.
        processor_kwargs: what the engine passes on to the processor.

    Raises:
        ValueError: the model's visual tokens are not known, or the engine has others.
        OSError: the checkpoint is not at hand.
    """
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(model)
    try:
        require_known(config)
    except ValueError as error:
        raise ValueError(f"{error}; {ADVICE}") from error
    processor = AutoProcessor.from_pretrained(model)
    content = [
        part if part["type"] == "text" else {"type": "image"} for part in messages[-1]["content"]
    ]
    prompt = processor.apply_chat_template(
        [{**messages[-1], "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", **processor_kwargs)
    grid = token_grid(config, inputs, Size(image.height, image.width))
    ids = inputs["input_ids"][0].tolist()
    expected, count = ids.count(config.image_token_id), sum(end - start for start, end in runs)
    if count != expected:
        raise ValueError(
            f"the processor of {model} makes {expected} visual tokens of the image, and the engine "
            f"has {count}: does it resize images in another way (mm_processor_kwargs)? If so, "
            f"{ADVICE}"
        )
    before = grid.first - ids.index(config.image_token_id)
    grid = dataclasses.replace(grid, first=runs[0][0] + before)
    _require_inside(grid, runs)
    return grid


def _require_inside(grid: TokenGrid, runs: Runs) -> None:
    for row in range(grid.cells.height):
        start = grid.first + row * grid.stride
        end = start + grid.cells.width
        if not any(run[0] <= start and end <= run[1] for run in runs):
            raise ValueError(
                f"row {row} of the grid should be tokens {start} to {end - 1} of the prompt, and "
                f"not all of these are visual: {ADVICE}"
            )
