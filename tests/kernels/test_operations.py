# SPDX-License-Identifier: Apache-2.0
"""The table of operations: what is chosen for a device, and when a server must not start."""

import inspect
import sys

import pytest
import torch
import triton

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import native, operations, reference
from vllm_kvcompress.kernels.operations import OPERATIONS, Operation


@pytest.fixture
def compiles(monkeypatch):
    """Triton as on a GPU server: it does not interpret."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)


@pytest.fixture
def table(monkeypatch):
    """A table of its own."""
    rows: dict[str, Operation] = {}
    monkeypatch.setattr(operations, "OPERATIONS", rows)
    return rows


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_rows_of_the_table(operation):
    """The name is the module's; GPUs have the kernels they need; all versions are called alike."""
    assert getattr(kernels, operation.name) is operation
    assert operation.name in kernels.__all__
    assert operation.on("cuda").language == ("torch" if operation.torch_on_gpu else "Triton")
    expected = list(inspect.signature(operation.definition).parameters.values())
    assert list(inspect.signature(operation).parameters.values()) == expected
    for call in (operation.on("cuda").call, operation.cpp):
        if call is not None:
            assert call.__name__ == operation.name
            found = list(inspect.signature(call).parameters.values())
            assert found[: len(expected)] == expected
            assert all(extra.default is not extra.empty for extra in found[len(expected) :])


def test_cpp_where_it_was_built(cpp, monkeypatch, table):
    chosen = Operation(reference.select_tokens, triton="selection", cpp=native.select_tokens)
    assert chosen.on("cpu").call is native.select_tokens
    monkeypatch.setattr(native, "available", lambda: False)
    assert chosen.on("cpu").call is native.select_tokens, "chosen once"
    plain = Operation(reference.select_tokens, triton="selection", cpp=native.select_tokens)
    assert plain.on("cpu").call is reference.select_tokens
    assert operations.describe("cpu").startswith("torch (C++ was not built: install with")


@pytest.mark.parametrize("paged", [False, True])
def test_the_first_argument_tells_the_device(table, paged):
    def where(first, factor):
        return factor * 2

    operation = Operation(where)
    tensor = torch.zeros(1, device="meta")
    first = kernels.PromptPages(tensor, tensor, 1, kernels.PageLayout(1, 1)) if paged else tensor
    assert operation(first, factor=4) == 8
    assert list(operation._chosen) == ["meta"]


def test_description_of_a_gpu():
    assert kernels.describe("cuda") == "Triton; in torch: gaussian_logits"


def test_description_of_a_cpu(cpp):
    assert kernels.describe("cpu") == "C++; in torch: strength_and_skewness"


def test_a_gpu_with_triton_is_accepted(compiles):
    assert kernels.missing_on("cuda") == []


def test_a_cpu_is_accepted_without_anything(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(native, "available", lambda: False)
    assert kernels.missing_on("cpu") == []


def test_a_gpu_without_a_kernel(compiles, table):
    Operation(reference.select_tokens, triton="selection")
    Operation(reference.head_counts)
    (reason,) = operations.missing_on("cuda")
    assert "no kernels for cuda: head_counts: " in reason
    assert "without --kv-compression" in reason
    (reason,) = operations.missing_on("xpu")
    assert "no kernels for xpu: select_tokens, head_counts: serve on CUDA or on a CPU" in reason


def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    (reason,) = kernels.missing_on("cuda")
    assert "kernels cannot run on cuda: Triton cannot be imported (" in reason
    assert "install the triton that this torch asks for" in reason


def test_a_gpu_that_would_interpret(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    (reason,) = kernels.missing_on("cuda")
    assert "unset TRITON_INTERPRET" in reason
