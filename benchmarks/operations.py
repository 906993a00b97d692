# SPDX-License-Identifier: Apache-2.0
"""Single operations that ``kernel_bench.py`` times: inputs, implementations, bytes and FLOPs.

Ours are called by the names of ``vllm_kvcompress.kernels``, which pick the device's best. All of
them in a row, for all layers, are in ``whole_call.py``, decode attention is in
``decode_operations.py``.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from experiments import cuda_selection
from gpucheck.stress import Compaction, in_place
from rivals import Calls, Rival, Unsuitable, require_gpu

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import (
    HeldPages,
    PageLayout,
    PromptPages,
    reference,
    reference_decode,
)

BLOCK_SIZE, WINDOW = 16, 32
KEPT_SHARE = 0.1  # of a prompt
TRACE_LAYERS = 4
POOLING = {"kernel": 5, "pool": "avg"}
BACON = {"trace_r": TRACE_LAYERS, "mode": "elt", "local_k": 5, "lambda_c": 0.5, "topk_frac": 2.0}


class Shape(NamedTuple):
    """N prompts of the same length T, in one layer of a model or in all of them."""

    model: str
    num_q_heads: int
    num_kv_heads: int
    head_size: int
    length: int
    num: int
    num_layers: int = 2

    @property
    def page_bytes(self) -> int:
        """Of keys and values, 2 bytes an element."""
        return 4 * self.num * self.length * self.num_kv_heads * self.head_size

    @property
    def held_bytes(self) -> int:
        """Of all inputs, and of what makes them."""
        return self.page_bytes + 64 * self.num * self.num_kv_heads * self.length

    @property
    def num_kept(self) -> int:
        """Tokens kept per head, whole blocks, the window at least."""
        return max(int(KEPT_SHARE * self.length), 2 * WINDOW) // BLOCK_SIZE * BLOCK_SIZE


class Inputs(NamedTuple):
    """Of all operations. Scores [N, Hkv, T] float32, tables int64 unless said otherwise.

    Attributes:
        queries: [N, W, Hq, D] bfloat16.
        scale: [N] float32, of the logits.
        base, evidence: as the calibration gets them; trace: [layers, N, Hkv, T], of the layers
            before and of this one.
        kept: [N, Hkv, K]; count, start: [N, Hkv]; num_full, num_kept: [N], in blocks.
    """

    shape: Shape
    queries: torch.Tensor
    prompts: PromptPages
    prompt_lens: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor
    evidence: torch.Tensor
    trace: torch.Tensor
    num_candidates: torch.Tensor
    capacity: torch.Tensor
    kept: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    num_full: torch.Tensor
    num_kept: torch.Tensor


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Random and the same every time; blocks lie all over the pool."""
    generator = torch.Generator(device).manual_seed(shape.length)
    num, heads, length = shape.num, shape.num_kv_heads, shape.length
    num_blocks, row = length // BLOCK_SIZE, BLOCK_SIZE * 2 * shape.head_size

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, device=device, generator=generator)

    def full(value: int, *size: int) -> torch.Tensor:
        return torch.full(size, value, dtype=torch.int64, device=device)

    pages = torch.empty(num * num_blocks * heads, row, dtype=torch.bfloat16, device=device)
    pages.normal_(generator=generator)
    table = torch.randperm(num * num_blocks, device=device, generator=generator)
    layout = PageLayout(BLOCK_SIZE, shape.head_size)
    prompts = PromptPages(pages, table.view(num, -1), heads, layout)
    queries = torch.empty(num, WINDOW, shape.num_q_heads, shape.head_size, device=device)
    kept_blocks = shape.num_kept // BLOCK_SIZE
    count = full(kept_blocks, num, heads)
    order = draw(num, heads, length).argsort(2)[:, :, : shape.num_kept]
    # few large ones, as attention has them
    base, *trace = (draw(num, heads, length) ** 8 for _ in range(TRACE_LAYERS + 2))
    return Inputs(
        shape,
        queries.normal_(generator=generator).bfloat16(),
        prompts,
        full(length, num),
        torch.full((num,), shape.head_size**-0.5, device=device),
        base,
        trace[-1],
        torch.stack(trace),
        full(length - WINDOW, num),
        full(shape.num_kept - WINDOW, num),
        order.sort(2).values,
        count,
        count.cumsum(1) - count,
        full(num_blocks, num),
        full(kept_blocks, num),
    )


class Cost(NamedTuple):
    """Of one call: least bytes and FLOPs, and what plain implementations and check allocate."""

    bytes: int
    flops: int
    plain_bytes: int


PLAIN = ("torch", "einsum", "topk", "kvpress")
"""Implementations that need ``Cost.plain_bytes``."""


@dataclass(frozen=True)
class Operation:
    """One line of the benchmark.

    Attributes:
        implementations: calls by name; "ours" and "torch" always.
        check: raises AssertionError where ours differs from the plain definition.
        kernel: name in ``vllm_kvcompress.kernels`` of what is timed, or of its last step.
        launches: how many a call makes, where that is known.
        baseline: implementation that the others' times are divided by.
        replayed: as engines replay it from a CUDA graph: without the time to launch its kernels.
        candidates: implementations of ours that the table of operations chooses from.
    """

    name: str
    cost: Callable[[Shape], Cost]
    implementations: Callable[[Inputs], Calls]
    check: Callable[[Inputs], None]
    kernel: str
    replayed: bool = False
    candidates: tuple[str, ...] = ()
    launches: Callable[[Shape], int] | None = None
    baseline: str = ""


def entries(shape: Shape) -> int:
    """Scores of one kind."""
    return shape.num * shape.num_kv_heads * shape.length


def require(holds: bool | torch.Tensor, what: str) -> None:
    assert bool(holds), f"{what}: ours differs from the plain definition"


# window_scores


def scores_cost(shape: Shape) -> Cost:
    logits = shape.num * shape.num_q_heads * WINDOW * shape.length
    keys = shape.page_bytes // 2
    repeated = keys * shape.num_q_heads // shape.num_kv_heads
    plain_bytes = 12 * logits + 6 * keys + repeated
    return Cost(keys + 2 * 4 * entries(shape), 2 * logits * shape.head_size, plain_bytes)


def repeated_window(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention of the window as projects around SnapKV compute it: keys once per query head,
    logits and probabilities in the model's type, the softmax between them in float32.

    Args:
        queries: [N, W, Hq, D].
        keys: [N, Hkv, T, D], contiguous, as the cache of these projects is.

    Returns:
        [N, Hq, W, T].
    """
    window, num_q_heads, head_size = queries.shape[1:]
    every = keys.repeat_interleave(num_q_heads // keys.shape[1], dim=1)
    logits = torch.einsum("nwhd,nhtd->nhwt", queries, every) * head_size**-0.5
    rows = torch.ones(window, window, dtype=torch.bool, device=keys.device)
    logits[..., -window:].masked_fill_(rows.triu(1), torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).to(queries.dtype)


def scores_calls(x: Inputs) -> Calls:
    def plain():
        keys = reference.read_prompt(x.prompts, "key")
        return reference.window_scores(x.queries, keys, x.prompt_lens, x.scale)

    @functools.cache
    def keys() -> torch.Tensor:  # made by the first call, which is not timed
        return reference.read_prompt(x.prompts, "key").contiguous()

    def einsum():
        probs = repeated_window(x.queries, keys()).unflatten(1, (x.shape.num_kv_heads, -1))
        return probs.mean((2, 3)), probs[:, :, :, -1].mean(2)

    return {
        "ours": lambda: kernels.window_scores(x.queries, x.prompts, x.prompt_lens, x.scale),
        "torch": plain,
        "einsum": einsum,
    }


def scores_check(x: Inputs) -> None:
    calls = scores_calls(x)
    for ours, plain in zip(calls["ours"](), calls["torch"](), strict=True):
        require(torch.allclose(ours, plain, rtol=1e-4, atol=1e-9), "window_scores")


# bacon_evidence and bacon_calibrate


def evidence_calls(x: Inputs) -> Calls:
    args = (x.base, x.base + x.evidence, x.num_candidates)
    return {
        "ours": lambda: kernels.bacon_evidence(*args, **POOLING),
        "torch": lambda: reference.bacon_evidence(*args, **POOLING),
    }


def evidence_check(x: Inputs) -> None:
    calls = evidence_calls(x)
    for ours, plain in zip(calls["ours"](), calls["torch"](), strict=True):
        require(torch.allclose(ours, plain, rtol=1e-4, atol=1e-7), "bacon_evidence")


def calibrate_calls(x: Inputs) -> Calls:
    args = (x.base, x.evidence, x.trace, x.num_candidates, x.capacity)
    return {
        "ours": lambda: kernels.bacon_calibrate(*args, **BACON),
        "torch": lambda: reference.bacon_calibrate(*args, **BACON),
    }


def calibrate_check(x: Inputs) -> None:
    calls, scored = calibrate_calls(x), x.shape.length - WINDOW
    ours, plain = (calls[name]()[:, :, :scored] for name in ("ours", "torch"))
    require(torch.allclose(ours, plain, rtol=1e-4, atol=1e-7), "bacon_calibrate")


# select_tokens


def select_calls(x: Inputs) -> Calls:
    num_kept = x.shape.num_kept
    args = (x.base, x.count * BLOCK_SIZE, x.num_candidates, x.prompt_lens, num_kept)
    copy = torch.empty_like(x.base)

    def cuda() -> Callable[[], torch.Tensor]:
        require_gpu(x.base)
        if not cuda_selection.available(x.base.device):
            raise Unsuitable("not built (gpucheck/cuda_build.py), or a GPU before sm_90")
        return lambda: cuda_selection.select_tokens(*args)

    calls: Calls = {
        "ours": lambda: kernels.select_tokens(*args),
        "torch": lambda: reference.select_tokens(*args),
        "topk": lambda: x.base.topk(num_kept, dim=2).indices.sort(2).values,
        "copy": lambda: copy.copy_(x.base),  # of the scores
    }
    if x.base.is_cuda:
        from vllm_kvcompress.kernels import selection  # CPU installations may lack Triton

        calls["row"] = lambda: selection.select_by_row(*args)
        calls["tile"] = lambda: selection.select_by_tile(*args)
    # like code of others: where it is wrong, the rest is timed nevertheless
    calls["cuda"] = Rival(cuda, lambda kept: torch.equal(kept, kernels.select_tokens(*args)))
    return calls


def select_check(x: Inputs) -> None:
    calls = select_calls(x)
    plain = calls["torch"]()
    for name in calls.keys() & {"ours", "row", "tile"}:
        require(torch.equal(calls[name](), plain), "select_tokens")


# head_counts, of a layer whose heads share a budget


def counts_calls(x: Inputs) -> Calls:
    args = (x.base, x.capacity, True)
    return {
        "ours": lambda: kernels.head_counts(*args),
        "torch": lambda: reference.head_counts(*args),
    }


def counts_check(x: Inputs) -> None:
    calls = counts_calls(x)
    require(torch.equal(calls["ours"](), calls["torch"]()), "head_counts")


# stage_tokens and write_pages


def compact_cost(shape: Shape) -> Cost:
    moved = shape.num * shape.num_kv_heads * shape.num_kept
    row = 2 * shape.head_size  # elements of a token
    copies = 2 * shape.page_bytes  # the check works on copies of all pages
    return Cost(moved * (2 * 2 * row + 8), 0, moved * row * 24 + copies)


def compaction_of(x: Inputs) -> Compaction:
    heads = x.shape.num_kv_heads
    size = (x.shape.num, x.shape.num_kept // BLOCK_SIZE * heads, x.prompts.pages.shape[1])
    staged, num_pages = x.prompts.pages.new_empty(size), x.num_kept * heads
    return Compaction(staged, x.kept, x.count, x.start, num_pages, x.num_full, x.num_kept)


def compact_calls(x: Inputs) -> Calls:
    tables = compaction_of(x)
    return {
        "ours": lambda: in_place(kernels, x.prompts, tables),
        "torch": lambda: in_place(reference, x.prompts, tables),
    }


def compact_check(x: Inputs) -> None:
    results = []
    for name in ("ours", "torch"):
        pages = x.prompts.pages.clone()
        compact_calls(x._replace(prompts=x.prompts._replace(pages=pages)))[name]()
        results.append(pages.view(torch.int16))
    require(torch.equal(*results), "write_pages")


# head_page_tables of one layer, in a decode step in which all N prompts are compressed


def tables_cost(shape: Shape) -> Cost:
    pages = shape.num * shape.num_kv_heads * (shape.num_kept // BLOCK_SIZE + 1)
    table = 4 * shape.num * shape.num_kv_heads * shape.length // BLOCK_SIZE
    return Cost(4 * 2 * pages, 0, 16 * table)


def table_maker(
    fill: Callable[..., None], blocks: torch.Tensor, seq_lens: torch.Tensor, held: HeldPages
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Makes tables and lengths of one layer's per-head sequences, always in the same buffers."""
    num_seqs = len(blocks) * held.page_count.shape[2]
    table, kv_len = blocks.new_zeros(1, num_seqs, blocks.shape[1]), blocks.new_zeros(1, num_seqs)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        fill(table, kv_len, blocks, seq_lens, held, BLOCK_SIZE)
        return table[0], kv_len[0]

    return call


def tables_calls(x: Inputs) -> Calls:
    tensors = (x.num_full, x.num_kept, x.count[None], x.start[None])
    slots = torch.arange(x.shape.num, device=x.count.device)
    held = HeldPages(slots, *(t.int().contiguous() for t in tensors))
    blocks, seq_lens = x.prompts.block_table.int(), x.prompt_lens.int()
    return {
        "ours": table_maker(kernels.head_page_tables, blocks, seq_lens, held),
        "torch": table_maker(reference_decode.head_page_tables, blocks, seq_lens, held),
    }


def tables_check(x: Inputs) -> None:
    calls = tables_calls(x)
    for ours, plain in zip(calls["ours"](), calls["torch"](), strict=True):
        require(torch.equal(ours, plain), "head_page_tables")


OPERATIONS = (
    Operation("window_scores", scores_cost, scores_calls, scores_check, "window_scores"),
    Operation(
        "bacon_evidence",
        lambda s: Cost(4 * entries(s) * 4, 0, 100 * entries(s)),
        evidence_calls,
        evidence_check,
        "bacon_evidence",
    ),
    Operation(
        "bacon_calibrate",
        lambda s: Cost(4 * entries(s) * (TRACE_LAYERS + 3), 0, 100 * entries(s)),
        calibrate_calls,
        calibrate_check,
        "bacon_calibrate",
    ),
    Operation(
        "select_tokens",
        lambda s: Cost(
            4 * entries(s) + 8 * s.num * s.num_kv_heads * s.num_kept, 0, 100 * entries(s)
        ),
        select_calls,
        select_check,
        "select_tokens",
        candidates=("row", "tile", "cuda"),
    ),
    Operation(
        "head_counts",
        lambda s: Cost(4 * entries(s), 0, 100 * entries(s)),
        counts_calls,
        counts_check,
        "head_counts",
    ),
    Operation("head_page_tables", tables_cost, tables_calls, tables_check, "head_page_tables"),
    # changes the pages, from random ones to others
    Operation("write_pages", compact_cost, compact_calls, compact_check, "write_pages"),
)
