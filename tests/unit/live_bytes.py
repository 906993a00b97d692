# SPDX-License-Identifier: Apache-2.0
"""Bytes of the tensors that are alive, and the most there were."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from vllm_kvcompress.kernels.operations import Operation


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated inside it.

    Of operations, and of the methods (class, name) ``opaque``, only the results count.
    """

    def __init__(self, monkeypatch, opaque: Sequence[tuple[type, str]] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._own: set[int] = set()
        self._depth = 0
        for owner, name in ((Operation, "__call__"), *opaque):
            monkeypatch.setattr(owner, name, self._opaque(getattr(owner, name)))

    def _opaque(self, method: Callable) -> Callable:
        def call(*args, **kwargs):
            self._depth += 1
            with _disable_current_modes():
                found = method(*args, **kwargs)
            self._depth -= 1
            if not self._depth:
                self._count(found, (args, kwargs))
            return found

        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self._count(found, (args, kwargs))
        return found

    def _count(self, found, given) -> None:
        views = {t.untyped_storage()._cdata for t in tree_leaves(given) if torch.is_tensor(t)}
        for tensor in tree_leaves(found):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in views or key in self._own:
                continue
            self._own.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._own.discard(key)
        self.live -= size
