# SPDX-License-Identifier: Apache-2.0
"""The CUDA selection: on threads of the CPU, compiled where there is nvcc, and on a GPU."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from experiments import cuda_selection
from selections import score_rows

from vllm_kvcompress.kernels import reference

KERNEL = Path(__file__).parents[2] / "benchmarks" / "experiments" / "cuda" / "select_rows.cuh"
ON_CPU = Path(__file__).with_name("cuda_on_cpu")
ON_GPU = torch.cuda.is_available() and cuda_selection.available(torch.device("cuda"))
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """``select_tokens`` in clusters of so many blocks of 64 threads each."""
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the kernel itself")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    declared, is_here = "extern __shared__ uint4 shared_memory[];", "this_block->memory.data();"
    source = KERNEL.read_text()
    assert source.count(declared) == 1
    source = source.replace(declared, f"uint4* shared_memory = {is_here}")
    (folder / KERNEL.name).write_text(source)
    built = folder / "select_rows.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
    subprocess.run(
        [compiler, *flags, f"-I{folder}", f"-I{ON_CPU}", ON_CPU / "select_rows.cpp", "-o", built],
        check=True,
    )
    library = ctypes.CDLL(str(built))

    def select_tokens(scores, count, candidate_end, protected_end, max_count, num_blocks):
        num, heads, length = scores.shape
        width = min(max_count, length)
        kept = torch.full((num, heads, width), -1)
        tensors = (scores, count, candidate_end, protected_end, kept)
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        library.select_rows(*pointers, num * heads, heads, length, width, num_blocks)
        return kept

    return select_tokens


@pytest.mark.parametrize(
    ("kind", "length", "num_blocks"),
    [  # all pairs
        (kind, length, (1, 2, 8)[(i + j) % 3])
        for i, kind in enumerate(("normal", "small", "ties", "special", "bits"))
        for j, length in enumerate((1, 63, 1000))
    ],
)
def test_every_budget(emulated, kind, length, num_blocks):
    """One head per budget: nothing, everything, and what lies between."""
    budgets = sorted({0, 1, length // 3, length - 1, length})
    scores = score_rows(kind, 1, len(budgets), length)
    tensors = (scores, torch.tensor([budgets]), torch.tensor([length]), torch.tensor([length]))
    expected = reference.select_tokens(*tensors, length)
    assert torch.equal(emulated(*tensors, length, num_blocks), expected)


@pytest.mark.parametrize("num_blocks", [1, 4])
@pytest.mark.parametrize("slack", [0, 5])
def test_ragged_requests(emulated, num_blocks, slack):
    """Requests of unlike lengths with pinned ranges, a count for each head, garbage behind."""
    candidates, protected_end = torch.tensor([900, 300, 0, 63]), torch.tensor([932, 700, 32, 64])
    scores = score_rows("special", 4, 3, 1000)
    for row, end in enumerate(candidates):
        scores[row, :, end:] = torch.nan if row % 2 else torch.inf
    count = torch.tensor([[31, 32, 932], [0, 401, 700], [32, 32, 32], [1, 17, 64]])
    tensors = (scores, count, candidates, protected_end)
    expected = reference.select_tokens(*tensors, 932 + slack)
    assert torch.equal(emulated(*tensors, 932 + slack, num_blocks), expected)


@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_compiles_for_a_gpu(tmp_path):
    source = tmp_path / "kernel.cu"
    instance = "template __global__ void kvcompress::select_rows<1024>(kvcompress::Selection);"
    source.write_text(f'#include "{KERNEL}"\n{instance}\n')
    assert NVCC is not None
    command = [NVCC, "-arch=sm_90", "-std=c++20", "-O3", "-cubin", "--resource-usage", source]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stdout + done.stderr


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU with clusters, and gpucheck.cuda_build")
@pytest.mark.parametrize("kind", ["normal", "small", "ties", "special", "bits"])
@pytest.mark.parametrize("length", [1, 4097, 8192, 131072, 400001])
def test_on_a_gpu(kind, length):
    """One block, several, and as many positions as fit."""
    budgets = [0, 1, length // 10, length]
    scores = score_rows(kind, 2, len(budgets), length)
    ends = torch.tensor([length, max(length - 100, 0)])
    count = torch.tensor([budgets, budgets]).minimum(ends[:, None])
    tensors = (scores, count, (ends - 32).clamp_min(0), ends)
    expected = reference.select_tokens(*tensors, length)
    found = cuda_selection.select_tokens(*(tensor.cuda() for tensor in tensors), length)
    assert torch.equal(found.cpu(), expected)
