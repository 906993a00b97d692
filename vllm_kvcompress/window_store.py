# SPDX-License-Identifier: Apache-2.0
"""Queries that an observation window needs from earlier prefill chunks."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch


class WindowStore:
    """Queries of observation windows that straddle prefill chunks, by request.

    Grows with the number of requests that are inside their window at the same time (few), and gives
    the rows back when a request ends its prompt or leaves.
    """

    def __init__(self, num_layers: int, window: int) -> None:
        self._num_layers = num_layers
        self._window = window
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self.queries: torch.Tensor | None = None  # [rows, L, W, Hq, D]

    def rows(self, req_ids: Sequence[str]) -> np.ndarray:
        """Rows [len(req_ids)] int64 of the requests; new ones get a row."""
        for req_id in req_ids:
            if req_id not in self._row_of:
                taken = len(self._row_of) + len(self._free)
                self._row_of[req_id] = self._free.pop() if self._free else taken
        return np.array([self._row_of[req_id] for req_id in req_ids], dtype=np.int64)

    def discard(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            row = self._row_of.pop(req_id, None)
            if row is not None:
                self._free.append(row)

    def reserve(self, like: torch.Tensor) -> torch.Tensor:
        """The storage, large enough for every row; ``like`` [..., Hq, D] gives type and device."""
        need = len(self._row_of) + len(self._free)
        if self.queries is None or self.queries.shape[0] < need:
            shape = (2 * need, self._num_layers, self._window, *like.shape[-2:])
            grown = like.new_zeros(shape)
            if self.queries is not None:
                grown[: self.queries.shape[0]] = self.queries
            self.queries = grown
        return self.queries
