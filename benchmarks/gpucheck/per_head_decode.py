# SPDX-License-Identifier: Apache-2.0
"""Decode attention of stock FlashAttention against per-head batches, on the same bytes.

    python -m gpucheck.per_head_decode --out per_head_decode.csv
    python -m gpucheck.per_head_decode --out per_head_decode.csv --cpu   # shapes only

Stock attends to R sequences of Hkv heads, a per-head batch to R * Hkv sequences of one head: what
engines do with compressed prompts, whose heads keep tokens of their own. Here all heads keep the
same tokens, so both read the same bytes and must give the same result. Each call is compared with
plain torch, then replayed from a CUDA graph of as many layers as a model has.

    stock NHD           vLLM's own layout of the cache
    stock HND           the layout that has head pages, read by the same kernel
    per head            as engines call it: a schedule shared by all layers
    per head, unscheduled
    per head, long      with the bound on lengths that a model of 32k has

From 993 sequences on FlashAttention 3 plans its splits in another way, so batches go to 2,048.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rivals import FAILURES, FlashAttention

BLOCK_SIZE, HEAD_SIZE = 16, 128
LAYERS, REPEATS = 28, 5
LONGEST = 32768  # tokens
TOLERANCE = 0.02  # of bfloat16 results of order 1


class Case(NamedTuple):
    """R sequences of as many kept tokens each."""

    num: int
    num_q_heads: int
    num_kv_heads: int
    length: int


CASES = (
    Case(1, 28, 4, 830),
    Case(8, 28, 4, 830),
    Case(8, 28, 4, 8203),
    Case(32, 28, 4, 830),
    Case(64, 28, 4, 830),
    Case(256, 28, 4, 830),
    Case(128, 32, 8, 2059),
    Case(256, 32, 8, 830),
)
SHAPES_ONLY = (Case(2, 28, 4, 100), Case(3, 8, 8, 33))


class Inputs(NamedTuple):
    """Of one case.

    Attributes:
        queries: [R, Hq, D].
        pages: [R * B + 1, Hkv, block_size, 2 * D], block 0 nobody's.
        table: [R, B] int32; lengths: [R] int32.
    """

    queries: torch.Tensor
    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(case.length)
    blocks = -(-case.length // BLOCK_SIZE)

    def draw(*shape: int) -> torch.Tensor:
        numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return numbers.normal_(generator=generator)

    table = torch.randperm(case.num * blocks, device=device, generator=generator) + 1
    return Inputs(
        draw(case.num, case.num_q_heads, HEAD_SIZE),
        draw(case.num * blocks + 1, case.num_kv_heads, BLOCK_SIZE, 2 * HEAD_SIZE),
        table.view(case.num, blocks).int(),
        torch.full((case.num,), case.length, dtype=torch.int32, device=device),
    )


def plain(x: Inputs, num: int) -> torch.Tensor:
    """Attention [num, Hq, D] float32 of the first sequences, in torch."""
    results = []
    for queries, table, length in zip(x.queries[:num], x.table, x.lengths.tolist(), strict=False):
        rows = x.pages[table.long()].transpose(0, 1).flatten(1, 2)[:, :length].float()
        keys, values = rows.split(queries.shape[1], dim=2)  # [Hkv, length, D]
        by_head = queries.float().unflatten(0, (len(keys), -1))  # [Hkv, G, D]
        weights = (by_head @ keys.transpose(1, 2) * queries.shape[1] ** -0.5).softmax(2)
        results.append((weights @ values).flatten(0, 1))
    return torch.stack(results)


def per_head(x: Inputs) -> Inputs:
    """The same as R * Hkv sequences of one head over the same pages."""
    num, heads = len(x.queries), x.pages.shape[1]
    head = torch.arange(heads, device=x.table.device)
    return Inputs(
        x.queries.view(num * heads, -1, HEAD_SIZE),
        x.pages.view(-1, 1, BLOCK_SIZE, 2 * HEAD_SIZE),
        (x.table[:, None].long() * heads + head[:, None]).flatten(0, 1).int(),
        x.lengths.repeat_interleave(heads),
    )


class Call:
    """FlashAttention over some inputs; ``schedule`` is what all layers share."""

    def __init__(self, x: Inputs, longest: int, by_token: bool = False, scheduled: bool = True):
        self.inputs = x
        pages = x.pages.transpose(1, 2)  # [blocks, block_size, Hkv, 2 * D]
        keys, values = (pages.contiguous() if by_token else pages).split(HEAD_SIZE, dim=3)
        self.attention = FlashAttention(x.queries, keys, values, longest)
        self.schedule = self.attention.schedule(x.lengths) if scheduled else None

    def __call__(self) -> torch.Tensor:
        return self.attention(self.inputs.table, self.inputs.lengths, self.schedule)


def calls(x: Inputs, length: int) -> Iterator[tuple[str, tuple]]:
    """Name and arguments of every ``Call``."""
    heads = per_head(x)
    yield "stock NHD", (x, length, True)
    yield "stock HND", (x, length)
    yield "per head", (heads, length)
    yield "per head, unscheduled", (heads, length, False, False)
    yield "per head, long", (heads, LONGEST)


def microseconds(call: Call) -> float:
    """Of one layer: the fastest of some replays of a graph with all layers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            call()
    graph.replay()
    best = float("inf")
    for _ in range(REPEATS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        best = min(best, before.elapsed_time(after))
    return 1000 * best / LAYERS


def measure(case: Case, device: torch.device) -> Iterator[dict[str, object]]:
    """A row for every call: its error, and its time if it is right."""
    x = make_inputs(case, device)
    expected = plain(x, 4)
    read = case.num * case.num_kv_heads * case.length * 4 * HEAD_SIZE
    stock = 0.0
    for name, arguments in calls(x, case.length):
        row: dict[str, object] = case._asdict() | {
            "call": name, "sequences": len(arguments[0].queries), "max_error": "", "us": "",
            "gb_per_s": "", "times_stock": "", "note": "",
        }  # fmt: skip
        try:
            if device.type == "cpu":
                result = plain(arguments[0], len(arguments[0].queries))
            else:
                call = Call(*arguments)
                result = call()
            result = result.view(x.queries.shape).float()
            error = float((result[: len(expected)] - expected).abs().max())
            row["max_error"] = f"{error:.1e}"
            if not (result.isfinite().all() and error <= TOLERANCE):
                row["note"] = "wrong"
            elif device.type == "cuda":
                us = microseconds(call)
                stock = stock or us
                row |= {"us": round(us, 2), "gb_per_s": round(read / us / 1e3)}
                row["times_stock"] = round(us / stock, 3)
        except FAILURES as error:
            row["note"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="small shapes, plain torch, no times")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda")
    writer, notes = None, 0
    with args.out.open("w", newline="") as sink, torch.inference_mode():
        for case in SHAPES_ONLY if args.cpu or args.small else CASES:
            for row in measure(case, device):
                if writer is None:
                    writer = csv.DictWriter(sink, row, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(row)
                sink.flush()
                notes += bool(row["note"])
                text = " ".join(f"{key} {value}" for key, value in row.items() if value != "")
                shown = "" if str(row["call"]) in ("stock HND", "per head, unscheduled") else "== "
                print(f"{shown}{text}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if notes:
        sys.exit(f"{notes} calls were wrong or did not run")


if __name__ == "__main__":
    main()
