# SPDX-License-Identifier: Apache-2.0
"""An operation under one name, and what runs behind that name on each kind of device."""

import functools
import importlib
from collections.abc import Callable
from typing import Generic, NamedTuple, ParamSpec, TypeVar

import torch

from vllm_kvcompress.kernels import native
from vllm_kvcompress.kernels.reference import PromptPages

P = ParamSpec("P")
R = TypeVar("R")

OPERATIONS: "dict[str, Operation]" = {}
"""All operations by name."""


class Implementation(NamedTuple, Generic[P, R]):
    """What runs an operation, and what that is written in: "Triton", "C++" or "torch"."""

    call: Callable[P, R]
    language: str


class Operation(Generic[P, R]):
    """Called like its definition; runs what was chosen for the device of its first argument.

    The choice is made once per type of device, by ``describe`` when a server starts or else by the
    first call.

    Args:
        definition: in torch, for any device.
        triton: module below ``vllm_kvcompress.kernels`` that has a function of the same name for
            GPUs. Imported when it is chosen: CPU installations may lack Triton.
        cpp: for CPUs, where it was built.
        torch_on_gpu: its definition is what GPUs are meant to run.
    """

    def __init__(
        self,
        definition: Callable[P, R],
        *,
        triton: str | None = None,
        cpp: Callable[P, R] | None = None,
        torch_on_gpu: bool = False,
    ) -> None:
        functools.update_wrapper(self, definition)
        self.name = definition.__name__
        self.definition, self.triton, self.cpp = definition, triton, cpp
        self.torch_on_gpu = torch_on_gpu
        self._chosen: dict[str, Implementation[P, R]] = {}
        OPERATIONS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        tensor = first.pages if isinstance(first, PromptPages) else first
        assert isinstance(tensor, torch.Tensor), "the first argument tells the device"
        return self.on(tensor.device.type).call(*args, **kwargs)

    def on(self, device_type: str) -> Implementation[P, R]:
        """What runs on a type of device."""
        if device_type not in self._chosen:
            self._chosen[device_type] = self._choose(device_type)
        return self._chosen[device_type]

    def _choose(self, device_type: str) -> Implementation[P, R]:
        if device_type == "cuda" and self.triton is not None:
            module = importlib.import_module(f"{__package__}.{self.triton}")
            return Implementation(getattr(module, self.name), "Triton")
        if device_type == "cpu" and self.cpp is not None and native.available():
            return Implementation(self.cpp, "C++")
        return Implementation(self.definition, "torch")


def describe(device_type: str) -> str:
    """What was chosen for a type of device, for the start-up line."""
    names: dict[str, list[str]] = {}
    for operation in OPERATIONS.values():
        names.setdefault(operation.on(device_type).language, []).append(operation.name)
    most, *others = sorted(names, key=lambda language: -len(names[language]))
    text = "; ".join([most, *(f"in {other}: {', '.join(names[other])}" for other in others)])
    if device_type == "cpu" and not native.available():
        text += " (C++ was not built: install with --no-build-isolation and a compiler)"
    return text


def missing_on(device_type: str) -> list[str]:
    """Why a server must not run its operations on this device, and what to change.

    A CPU may run plain definitions, the banner says so. On a GPU they would be slower than what
    compression saves, and nobody would see why: an accident, not a choice.
    """
    if device_type == "cpu":
        return []
    fault = triton_fault()
    if fault is not None:
        return [f"its kernels cannot run on {device_type}: {fault}"]
    plain = [
        name
        for name, op in OPERATIONS.items()
        if op.on(device_type).language == "torch" and not op.torch_on_gpu
    ]
    if plain:
        return [
            f"no kernels for {device_type}: {', '.join(plain)}: serve on CUDA or on a CPU, or "
            "without --kv-compression"
        ]
    return []


def triton_fault() -> str | None:
    """What keeps Triton from compiling kernels here, and what to do; None if nothing does."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}): install the triton that this torch asks for"
    if triton.knobs.runtime.interpret:
        return "Triton interprets kernels in Python: unset TRITON_INTERPRET"
    return None
