# SPDX-License-Identifier: Apache-2.0
"""Files that allocators read: measured once per model, checked when the engine starts."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

_HEAD_KEY = re.compile(r"(\d+)-(\d+)", re.ASCII)


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # bad JSON, or bytes that are not text
        raise ValueError(f"{path} is not JSON: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _some(names: list[str], limit: int = 5) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@functools.cache
def load_head_scores(path: str) -> tuple[tuple[float, ...], ...]:
    """How visual each query head is, [L][Hq].

    The file is a JSON object: keys "layer-head", both from 0, in any order; values lists of numbers
    >= 0, such as one per calibration image, whose mean is the head's score.

    Raises:
        ValueError: says what in the file is wrong.
    """
    raw = _read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f'{path}: expected a JSON object such as {{"0-0": [0.1], ...}}')
    means: dict[tuple[int, int], float] = {}
    for key, values in raw.items():
        match = _HEAD_KEY.fullmatch(key)
        if match is None:
            raise ValueError(f'{path}: key {key!r} is not "layer-head", such as "0-13"')
        if not isinstance(values, list) or not values or not all(map(_is_number, values)):
            raise ValueError(f"{path}: head {key} needs a list of finite numbers, not empty")
        if min(values) < 0:
            raise ValueError(f"{path}: head {key} has a negative score, {min(values)}")
        head = int(match[1]), int(match[2])
        if head in means:
            raise ValueError(f"{path}: duplicate entry for head {head[0]}-{head[1]}")
        means[head] = math.fsum(values) / len(values)
    num_layers = 1 + max(layer for layer, _ in means)
    num_heads = 1 + max(head for _, head in means)
    if len(means) < num_layers * num_heads:
        grid = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
        missing = [f"{layer}-{head}" for layer, head in grid if (layer, head) not in means]
        raise ValueError(
            f"{path}: of {num_layers} layers x {num_heads} query heads these are missing: "
            f"{_some(missing)}"
        )
    return tuple(
        tuple(means[layer, head] for head in range(num_heads)) for layer in range(num_layers)
    )


@functools.cache
def load_forget_fractions(path: str) -> tuple[float, ...]:
    """Share of the prompt that each layer forgets, [L], from a JSON list of numbers in [0, 1].

    Raises:
        ValueError: says what in the file is wrong.
    """
    raw = _read_json(path)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{path}: expected a JSON list of one number per layer")
    for layer, value in enumerate(raw):
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{path}: layer {layer} needs a number in [0, 1], got {value!r}")
    if min(raw) == 1:
        raise ValueError(f"{path}: all layers have fraction 1: nothing would be kept")
    return tuple(float(value) for value in raw)
