# SPDX-License-Identifier: Apache-2.0
"""What the kernel benchmark asks of other people's kernels, and what it does without them."""

import csv
import importlib
import sys
from dataclasses import replace
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
    """[S, G * H, D] of sequences over page tables; keys and values [pages, block_size, H, D]."""
    out = torch.zeros_like(queries)
    for i, length in enumerate(lengths.tolist()):
        k, v = (
            part[table[i].long()].flatten(0, 1)[:length].float().transpose(0, 1)
            for part in (keys, values)
        )  # [H, length, D]
        q = queries[i].float().unflatten(0, (len(k), -1))
        out[i] = ((q @ k.transpose(1, 2) * scale).softmax(2) @ v).flatten(0, 1).to(out.dtype)
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


class SplitDouble:
    """Stands in for ``xformers.ops.fmha``."""

    triton_splitk = SimpleNamespace(FwOp=object)

    class attn_bias:
        class PagedBlockDiagonalPaddedKeysMask:
            @staticmethod
            def from_seqlens(q_seqlen, kv_seqlen, block_tables, page_size, *, device):
                assert q_seqlen == [1] * len(kv_seqlen)
                return torch.tensor(kv_seqlen), block_tables, page_size

    @staticmethod
    def memory_efficient_attention_forward(queries, keys, values, mask, op):
        lengths, table, size = mask
        assert size == op.BLOCK_N
        keys, values = (part[0, :, :1].unflatten(0, (-1, size)) for part in (keys, values))
        return attend(queries[0], keys, values, table, lengths, queries.shape[3] ** -0.5)[None]


@pytest.fixture
def doubles(monkeypatch):
    """Imports of rivals find these."""
    flash = FlashDouble()
    found = {
        FLASH: flash,
        "flashinfer": SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=InferDouble),
        "xformers.ops.fmha": SplitDouble,
    }
    original = importlib.import_module
    monkeypatch.setattr(
        rivals.importlib, "import_module", lambda name: found.get(name) or original(name)
    )
    monkeypatch.setattr(rivals, "require_gpu", lambda tensor: None)
    return flash


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("name", ["flash-attn", "flash-attn+tables", "flashinfer", "xformers"])
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


def test_stock_reads_as_many_bytes(doubles):
    """All heads of a request the same tokens, whose number is that of the even case."""
    inputs = make_inputs(SHAPE, torch.device("cpu"))
    rival = decode_operations.decode_calls(inputs, True, jit=True)[decode_operations.STOCK]
    call = rival.ready()
    assert not isinstance(call, Absent), call
    assert call().isfinite().all()
    used = SHAPE.num_kept + decode_operations.TAIL
    assert doubles.called["seqused_k"].tolist() == [used] * SHAPE.num
    assert doubles.called["k"].shape[2] == SHAPE.num_kv_heads
    assert doubles.called["k"].is_contiguous() or doubles.called["k"].stride(2) == 2 * 16
    assert not rival.right(call() + 1)


def test_times_are_compared_with_stock(doubles):
    shape, cpu = SHAPE, torch.device("cpu")
    timer, machine = kernel_bench.Timer(cpu, quick=True), kernel_bench.Machine(1e9, 1e9)
    operation = decode_operations.decode_operations()[0]
    inputs = make_inputs(shape, cpu)
    rows = list(kernel_bench.measure(operation, shape, inputs, timer, machine, cpu, False))
    found = {row["implementation"]: row for row in rows if row["samples"]}
    assert found["stock"]["times_stock"] == 1
    for row in found.values():
        assert row["times_stock"] == pytest.approx(row["p50_us"] / found["stock"]["p50_us"])


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
    assert {"einsum", "kvpress"} <= names["compress bacon"] == names["compress bacon+adakv"]
    launched = {row["operation"]: row["launches"] for row in rows if row["launches"]}
    assert launched.keys() == {"compress bacon", "compress bacon+adakv"}
    assert all(int(count) > 20 for count in launched.values())
    assert names["paged_decode"] == names["paged_decode skewed"]
    assert {"stock", "flash-attn", "flashinfer", "xformers"} <= names["paged_decode"]
    missing = {row["implementation"] for row in rows if row["note"]}
    assert {"stock", "flash-attn", "flash-attn+tables", "flashinfer", "xformers"} <= missing


def test_what_is_wrong_has_no_time_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Rows are on disk when they are measured, and the run ends with an error."""
    out = tmp_path / "kernels.csv"
    wrong, right, *_ = kernel_bench.OPERATIONS
    on_disk = []

    def check(inputs):
        on_disk.append(out.read_text())
        raise AssertionError("ours differs")

    def look(inputs):
        on_disk.append(out.read_text())
        right.check(inputs)

    operations = (replace(wrong, check=check), replace(right, check=look))
    monkeypatch.setattr(kernel_bench, "OPERATIONS", operations)
    monkeypatch.setattr(kernel_bench, "QUICK_LENGTHS", (96,))
    monkeypatch.setattr(kernel_bench, "QUICK_BATCHES", (2,))
    arguments = ["kernel_bench", "--device", "cpu", "--quick", "--out", str(out), "--operations"]
    monkeypatch.setattr(sys, "argv", [*arguments, wrong.kernel, right.kernel])
    with pytest.raises(SystemExit, match="1 operations failed"):
        kernel_bench.main()
    with out.open() as source:
        rows = [row for row in csv.DictReader(source) if row["operation"] == wrong.name]
    assert [row["note"] for row in rows] == ["failed: AssertionError: ours differs"]
    before, after = on_disk
    assert wrong.name not in before
    assert wrong.name in after


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
