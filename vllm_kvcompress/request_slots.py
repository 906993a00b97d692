# SPDX-License-Identifier: Apache-2.0
"""Numbers for requests, under which workers keep what belongs to them."""

from collections.abc import Iterable, Sequence

import numpy as np


class RequestSlots:
    """Numbers below ``capacity``, stable from a request's first step to its last.

    A preempted request loses its number and comes back as a new one: nothing that was kept for its
    first life may be seen in its second.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._slot_of

    def assign(self, req_ids: Iterable[str]) -> np.ndarray:
        """Give new requests a number; returns these numbers, int64."""
        fresh = [req_id for req_id in req_ids if req_id not in self._slot_of]
        for req_id in fresh:
            self._slot_of[req_id] = self._free.pop()
        return self.of(fresh)

    def of(self, req_ids: Sequence[str]) -> np.ndarray:
        """Numbers of known requests, int64."""
        return np.array([self._slot_of[req_id] for req_id in req_ids], dtype=np.int64)

    def release(self, req_ids: Iterable[str]) -> np.ndarray:
        """Take numbers back, and return them, int64; ids that have none are ignored."""
        known = [req_id for req_id in req_ids if req_id in self._slot_of]
        freed = [self._slot_of.pop(req_id) for req_id in dict.fromkeys(known)]
        self._free += freed
        return np.array(freed, dtype=np.int64)
