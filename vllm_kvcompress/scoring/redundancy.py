# SPDX-License-Identifier: Apache-2.0
"""Released tables of key redundancy: JSON, "layer-head-key" -> cosines of sample prompts.

They have a "layer-head-value" beside each, which the released code does not read, either.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


class RatioTable:
    """Mean cosines by (layer, KV head of the model), read once.

    Raises:
        ValueError: the file cannot be read, or is not such a table.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._ratios = _load(path)
        self._rows: dict[int, torch.Tensor] = {}

    def ratios(self, layers: Sequence[int], first_head: int, like: torch.Tensor) -> torch.Tensor:
        """Ratios of a rank's heads, NaN where the table has none.

        Args:
            first_head: index in the model of the rank's first KV head.
            like: [R, Hkv], the same number of rows for every layer.

        Returns:
            [R, Hkv].
        """
        table = torch.stack([self._layer_ratios(layer, first_head, like) for layer in layers])
        return table.repeat_interleave(len(like) // len(layers), dim=0)

    def _layer_ratios(self, layer: int, first_head: int, like: torch.Tensor) -> torch.Tensor:
        """[Hkv], copied to the device when a layer is asked for the first time, never again."""
        if layer not in self._rows:
            heads = range(first_head, first_head + like.shape[1])
            if missing := [head for head in heads if (layer, head) not in self._ratios]:
                text = "%s has no ratio for layer %d, KV heads %s: computed from each prompt"
                logger.warning(text, self._path, layer, missing)
            row = [self._ratios.get((layer, head), float("nan")) for head in heads]
            self._rows[layer] = torch.tensor(row, dtype=like.dtype, device=like.device)
        return self._rows[layer]


def _load(path: str) -> dict[tuple[int, int], float]:
    try:
        table = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"ratio_table {path!r} is not readable JSON: {error}") from error
    if not isinstance(table, dict) or not table:
        raise ValueError(f'ratio_table {path!r} must be a JSON object {{"layer-head-key": [r]}}')
    ratios = {}
    for key, cosines in table.items():
        name = re.fullmatch(r"(\d+)-(\d+)-(key|value)", key)
        if name is None:
            raise ValueError(f'ratio_table {path!r}: key {key!r} is not of the form "3-0-key"')
        if not (isinstance(cosines, list) and cosines and all(map(_is_cosine, cosines))):
            raise ValueError(
                f"ratio_table {path!r}: {key!r} must be a list of numbers in [-1, 1], "
                f"got {cosines!r}"
            )
        if name[3] == "key":
            ratios[int(name[1]), int(name[2])] = sum(cosines) / len(cosines)
    if not ratios:
        raise ValueError(f"ratio_table {path!r} has no entry for keys")
    return ratios


def _is_cosine(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1 <= value <= 1
