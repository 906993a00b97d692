# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmark asks of other people's kernels, and what it does without them."""

import csv
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import decode_operations
import kernel_bench
import operations
import pytest
import rivals
import torch
import vllm
from operations import BLOCK_SIZE, Shape, make_inputs
from rivals import Absent, Rival
from vllm_sources import Sources, bindings, parameters

SHAPE = Shape("tiny", 6, 3, 16, 320, 2)
FLASH = "vllm.v1.attention.backends.fa_utils"


def attend(queries, keys, values, table, lengths, scale):
    """[S, G, D] of sequences over page tables; keys and values [pages, block_size, 1, D]."""
    out = torch.zeros_like(queries)
    for i, length in enumerate(lengths.tolist()):
        k, v = (part[table[i].long()].flatten(0, 2)[:length].float() for part in (keys, values))
        out[i] = ((queries[i].float() @ k.T * scale).softmax(1) @ v).to(out.dtype)
    return out


class FlashDouble:
    """Stands in for what vLLM says of FlashAttention; notes the arguments by name."""

    def __init__(self) -> None:
        self.scheduled: dict = {}
        self.called: dict = {}

    def get_flash_attn_version(self, head_size):
        return 3

    def get_scheduler_metadata(self, **arguments):
        self.scheduled = arguments
        return torch.zeros(1)

    def flash_attn_varlen_func(self, **arguments):
        self.called = arguments
        table, lengths = arguments["block_table"], arguments["seqused_k"]
        assert lengths.max() <= arguments["max_seqlen_k"]
        assert arguments["cu_seqlens_q"].tolist() == list(range(len(table) + 1))
        arguments["out"].copy_(
            attend(*(arguments[name] for name in "qkv"), table, lengths, arguments["softmax_scale"])
        )


class InferDouble:
    """Stands in for ``flashinfer``."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert layout == "HND"

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        q_data_type, kv_data_type, sm_scale,
    ):  # fmt: skip
        assert num_kv_heads == 1
        pages = [part.tolist() for part in indices.tensor_split(indptr[1:-1].long())]
        width = max(map(len, pages))
        self.table = torch.tensor([row + [0] * (width - len(row)) for row in pages])
        self.lengths = (indptr.diff() - 1) * page_size + last_page_len
        self.scale = sm_scale

    def run(self, queries, parts):
        keys, values = (part.transpose(1, 2) for part in parts)
        return attend(queries, keys, values, self.table, self.lengths, self.scale)


@pytest.fixture
def doubles(monkeypatch):
    """Imports of rivals find these."""
    flash = FlashDouble()
    found = {
        FLASH: flash,
        "flashinfer": SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=InferDouble),
    }
    original = importlib.import_module
    monkeypatch.setattr(
        rivals.importlib, "import_module", lambda name: found.get(name) or original(name)
    )
    monkeypatch.setattr(rivals, "require_gpu", lambda tensor: None)
    return flash


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn+tables", "flashinfer"])
def test_decode_rivals_compute_what_ours_does(doubles, skewed, name):
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    rival = decode_operations.decode_calls(inputs, skewed, jit=True)[name]
    assert isinstance(rival, Rival)
    call = rival.ready()
    assert not isinstance(call, Absent), call
    ours = decode_operations.decode_calls(inputs, skewed, jit=True)["ours"]
    torch.testing.assert_close(call().view(ours().shape), ours(), rtol=0.02, atol=0.02)
    if name == "flash-attn":
        assert doubles.called["scheduler_metadata"] is not None
        assert torch.equal(doubles.scheduled["cache_seqlens"], doubles.called["seqused_k"])


def test_flash_attention_takes_these_arguments(doubles):
    """In the sources of the installed vLLM; its CPU build cannot call them."""
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    decode_operations.decode_calls(inputs, skewed=False, jit=True)["flash-attn"].ready()
    sources = Sources(Path(vllm.__file__).parent.parent)
    module = "vllm.vllm_flash_attn.flash_attn_interface"
    offered = {name for name, _ in bindings(sources.module(FLASH).body)}
    for name, used in (
        ("flash_attn_varlen_func", doubles.called),
        ("get_scheduler_metadata", doubles.scheduled),
    ):
        assert name in offered
        _, function = sources.find(module, name)
        assert used.keys() <= set(parameters(function)), name
    assert "get_flash_attn_version" in offered


def test_a_rival_that_errs_gets_no_time(doubles, monkeypatch):
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    monkeypatch.setattr(doubles, "flash_attn_varlen_func", lambda **arguments: None)
    rival = decode_operations.decode_calls(inputs, skewed=False, jit=True)["flash-attn"]
    assert rival.ready() == Absent("its result differs from ours")


def test_a_rival_that_is_not_there():
    def make():
        return importlib.import_module("nobody_has_this")

    reason = Rival(make, lambda result: True).ready()
    assert isinstance(reason, Absent)
    assert "nobody_has_this" in reason.why


def test_flash_infer_does_not_compile_unasked(doubles):
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    rival = decode_operations.decode_calls(inputs, skewed=False, jit=False)["flashinfer"]
    assert "--jit" in rival.ready().why


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("length", [96, 2048, 32768])
def test_skew(heads, length):
    """The same pages as in the even case, one head with four times the mean where that can be."""
    shape = Shape("any", 2 * heads, heads, 16, length, 1)
    even = decode_operations.head_pages(shape, skewed=False)
    skewed = decode_operations.head_pages(shape, skewed=True)
    assert sum(skewed) == sum(even) == heads * shape.num_kept // BLOCK_SIZE
    assert max(skewed) <= length // BLOCK_SIZE - 1
    assert min(skewed) >= min(2, even[0])
    if heads >= 8 and length > 2000:
        assert skewed[0] == 4 * even[0]


def test_rows_of_a_run(tmp_path, monkeypatch):
    """Every implementation has a row: with a time, or with the reason why it has none."""
    out = tmp_path / "kernels.csv"
    monkeypatch.setattr(kernel_bench, "QUICK_LENGTHS", (96,))
    monkeypatch.setattr(kernel_bench, "QUICK_BATCHES", (2,))
    arguments = ["kernel_bench", "--device", "cpu", "--quick", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    kernel_bench.main()
    with out.open() as source:
        rows = list(csv.DictReader(source))
    assert len({(row["operation"], row["implementation"]) for row in rows}) == len(rows)
    for row in rows:
        assert bool(row["p50_us"]) != bool(row["note"]), row
        assert int(row["samples"]) == 2 * bool(row["p50_us"])
    names = {row["operation"]: set() for row in rows}
    for row in rows:
        names[row["operation"]].add(row["implementation"])
    assert all({"ours", "torch", "copy"} <= found for found in names.values())
    assert {"einsum", "kvpress"} <= names["compress_layer"]
    assert names["paged_decode"] == names["paged_decode skewed"]
    assert {"flash-attn", "flash-attn+tables", "flashinfer"} <= names["paged_decode"]
    missing = {row["implementation"] for row in rows if row["note"]}
    assert {"flash-attn", "flash-attn+tables", "flashinfer"} <= missing


def test_no_time_left(tmp_path, monkeypatch):
    out = tmp_path / "kernels.csv"
    arguments = ["--device", "cpu", "--quick", "--seconds", "-1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["kernel_bench", *arguments])
    kernel_bench.main()
    with out.open() as source:
        notes = [row["note"] for row in csv.DictReader(source)]
    assert len(notes) == 4
    assert all("seconds were over" in note for note in notes)


def test_what_does_not_fit(monkeypatch):
    """Neither checked nor timed: what needs more memory than there is; ours is."""
    monkeypatch.setattr(kernel_bench, "room", lambda device: 1.0)
    device = torch.device("cpu")
    inputs = make_inputs(SHAPE, device)
    timer, machine = kernel_bench.Timer(device, quick=True), kernel_bench.Machine(1e9, 1e9)
    rows = kernel_bench.measure(
        operations.OPERATIONS[0], SHAPE, inputs, timer, machine, device, ours_only=False
    )
    found = {row["implementation"]: row for row in rows}
    assert not found["ours"]["checked"]
    assert found["ours"]["samples"] == 2
    assert "memory" in found["torch"]["note"]
    assert "memory" in found["einsum"]["note"]


def test_a_graph_that_cannot_be_made(monkeypatch):
    """Somebody else's ends in a note, ours ends the run."""

    def refuse(call):
        raise RuntimeError("no capture\nand a long explanation")

    timer = kernel_bench.Timer(torch.device("cpu"), quick=True)
    monkeypatch.setattr(timer, "replayed", refuse)
    rival = Rival(lambda: lambda: 1, lambda result: True)
    assert kernel_bench.prepare(rival, timer) == Absent("no graph can be captured: no capture")
    with pytest.raises(RuntimeError, match="no capture"):
        kernel_bench.prepare(lambda: 1, timer)
