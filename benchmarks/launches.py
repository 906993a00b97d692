# SPDX-License-Identifier: Apache-2.0
"""How many kernels one compressing call launches on a GPU, counted without one.

    python benchmarks/launches.py                       # the table
    python benchmarks/launches.py --method vl-cache     # and where each launch comes from

All layers of N prompts go through the pipeline as they would on a GPU, but their tensors have no
memory and Triton's kernels are noted instead of launched. A launch is a Triton kernel or a torch
operator that is not just a view or an allocation; a few operators, such as sorts, launch more than
one kernel. Where the workspace does not hold all layers of all prompts, they go in several groups,
which launch as much each. Code that asks a tensor for a value fails: it would wait for the GPU.
"""

import argparse
import collections
import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pipeline_call import PipelineCall, Sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter, jit

from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.kernels.operations import OPERATIONS

METHODS = ("bacon", "bacon+adakv", "bacon-plus+uniform", "aircache", "vl-cache")
LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_SIZE = 28, 28, 4, 128  # Qwen2-VL-7B
PROMPT_LEN, BUDGET = 8192, 1024
WORKSPACE = KVCompressionConfig("bacon").workspace_mib << 20
SOURCES = ("vllm_kvcompress", "triton_kernels")
META = torch.device("meta")


class Launches(TorchDispatchMode):
    """Counts operators that launch something.

    Attributes:
        found: by (what, where in this project it was called).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {_storage(x) for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        # operators such as `to` and `contiguous` are views or copies, as it happens
        if (func._schema.is_mutable or made - given) and "empty" not in func._schema.name:
            self.note(func._schema.name.removeprefix("aten::"))
        return found

    def note(self, what: str) -> None:
        self.found[what, _caller()] += 1

    @property
    def total(self) -> int:
        return self.found.total()

    @property
    def in_triton(self) -> int:
        return sum(count for (what, _), count in self.found.items() if what.endswith("_kernel"))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _caller() -> str:
    """The innermost line of the plugin on the stack."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if any(source in path.parts for source in SOURCES):
            return f"{path.parent.name}/{path.name}:{frame.lineno} {frame.name}"
    return "?"


@contextlib.contextmanager
def counted() -> Iterator[Launches]:
    """Counts inside the block, in which nothing is launched."""
    launches = Launches()

    def note(self: Any, *args: object, **kwargs: object) -> None:
        function = getattr(self, "fn", self)
        launches.note(getattr(function, "__name__", str(function)))

    classes = (jit.JITFunction, interpreter.InterpretedFunction)
    before = [cls.run for cls in classes]
    chosen = [dict(operation._chosen) for operation in OPERATIONS.values()]
    for operation in OPERATIONS.values():
        operation._chosen[META.type] = operation.on("cuda")
    for cls in classes:
        cls.run = note
    try:
        with torch.inference_mode(), launches:
            yield launches
    finally:
        for cls, run in zip(classes, before, strict=True):
            cls.run = run
        for operation, old in zip(OPERATIONS.values(), chosen, strict=True):
            operation._chosen = old


def count(method: str, sizes: Sizes, workspace_bytes: int = WORKSPACE) -> Launches:
    """Of one call that compresses the prompts."""
    call = PipelineCall(method, sizes, META, workspace_bytes=workspace_bytes)
    with counted() as launches:
        call()
    return launches


def sizes_of(num: int) -> Sizes:
    """That many prompts in the model of the table."""
    return Sizes(LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_SIZE, PROMPT_LEN, num, BUDGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--method", help="one method, and where its launches come from")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--workspace", type=int, default=WORKSPACE, metavar="BYTES")
    args = parser.parse_args()
    for method in (args.method,) if args.method else METHODS:
        for num in args.prompts:
            launches = count(method, sizes_of(num), args.workspace)
            print(
                f"{method:14} N {num:2}  {launches.total:6} launches, "
                f"{launches.in_triton} of them Triton's",
                flush=True,
            )
            for (what, where), times in launches.found.items() if args.method else ():
                print(f"    {times:5} {what:28} {where}")


if __name__ == "__main__":
    main()
