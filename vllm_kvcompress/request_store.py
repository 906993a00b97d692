# SPDX-License-Identifier: Apache-2.0
"""What a prompt's earlier prefill chunks leave for the chunk that ends it."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch


class RequestStore:
    """One tensor per request that is inside its prompt, as rows of one growing tensor.

    Grows with the number of requests that need a row at the same time (few), and takes the rows
    back when a request ends its prompt or leaves. A row starts as zeros.
    """

    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self._new: list[int] = []
        self._rows: torch.Tensor | None = None

    def rows(self, req_ids: Sequence[str]) -> np.ndarray:
        """Rows [len(req_ids)] int64 of the requests; new ones get a row."""
        for req_id in req_ids:
            if req_id not in self._row_of:
                taken = len(self._row_of) + len(self._free)
                self._row_of[req_id] = self._free.pop() if self._free else taken
                self._new.append(self._row_of[req_id])
        return np.array([self._row_of[req_id] for req_id in req_ids], dtype=np.int64)

    def discard(self, req_ids: Iterable[str]) -> None:
        for req_id in req_ids:
            row = self._row_of.pop(req_id, None)
            if row is not None:
                self._free.append(row)

    @property
    def tensor(self) -> torch.Tensor:
        """The storage as it was reserved last."""
        assert self._rows is not None, "nothing was reserved"
        return self._rows

    def reserve(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The storage [rows, *shape], large enough for every row; shapes may only grow."""
        need = len(self._row_of) + len(self._free)
        old = self._rows
        if old is None:
            old = self._rows = torch.zeros((2 * need, *shape), dtype=dtype, device=device)
        sizes = [max(a, b) for a, b in zip(old.shape[1:], shape, strict=True)]
        if old.shape[0] < need or list(old.shape[1:]) != sizes:
            count = old.shape[0] if old.shape[0] >= need else 2 * need
            self._rows = torch.zeros((count, *sizes), dtype=dtype, device=device)
            self._rows[tuple(slice(0, size) for size in old.shape)] = old
        assert self._rows is not None
        if self._new:
            self._rows[self._new] = 0
            self._new = []
        return self._rows
