# SPDX-License-Identifier: Apache-2.0
"""The Triton page-table kernel, in the interpreter or on a GPU, against its reference."""

import importlib
import subprocess
import sys

import pytest
import torch

from vllm_kvcompress.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def page_tables():
    """The module; Triton decides when it is imported whether kernels are interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("vllm_kvcompress.kernels.page_tables")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_kvcompress.kernels.page_tables import _head_page_tables_kernel as kernel

signature = {name: "*i32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
constants = {"BLOCK_SIZE": 16, "TILE": 1024}
source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"),
                   constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
print(len(compiled.asm["cubin"]), compiled.metadata.shared)
"""


@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_blocks", "block_size", "width"),
    [(1, 1, 1, 16, 1), (5, 3, 40, 16, 33), (8, 4, 1100, 32, 1061), (2, 7, 63, 16, 63)],
)
def test_equals_the_reference(page_tables, num_rows, num_heads, num_blocks, block_size, width):
    generator = torch.Generator().manual_seed(num_rows)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, dtype=torch.int32, generator=generator)

    full = draw(0, num_blocks, num_rows)
    full[::3] = 0  # uncompressed rows
    compressed = full > 0
    kept = torch.where(compressed, torch.minimum(draw(1, 6, num_rows), full), 1).int()
    count = torch.where(compressed[:, None], draw(0, 7, num_rows, num_heads), 0).int()
    start = (count.cumsum(1) - count).int()
    table = draw(0, 9999, num_rows, num_blocks + 3)[:, :num_blocks]  # a row stride of its own
    seq_lens = draw(1, num_blocks * block_size + 1, num_rows)
    tensors = [t.to(DEVICE) for t in (table, seq_lens, full, kept, count, start)]
    expected = reference.head_page_tables(*tensors, block_size, width)
    found = page_tables.head_page_tables(*tensors, block_size, width)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability):
    """A cubin comes out, and needs no shared memory."""
    script = COMPILE.replace("CAPABILITY", str(capability))
    env = {"PATH": "/usr/bin:/bin", "HOME": "/tmp"}  # no TRITON_INTERPRET
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    cubin_bytes, shared = map(int, done.stdout.split())
    assert cubin_bytes > 0
    assert shared == 0
