# SPDX-License-Identifier: Apache-2.0
"""The C++ operations against their torch definitions, on the CPU and in one run.

    python -P benchmarks/cpu_kernels.py

Both take turns on the same inputs, so that whatever else the machine does meets both; ratios are
medians over those pairs. Every result is compared with the definition's before it is timed. Shapes
are those of the example model and, per layer, of Qwen2-VL-7B.
"""

import argparse
import csv
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, native, reference, reference_paged

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE, WINDOW, CAPACITY, TRACE = 32, 32, 96, 4
PROXIES, GROUPS, TAU = 512, 32, 0.95
KEPT_QUERIES, INSTRUCTION, ELITE = 256, 40, 4
"""Queries that are kept, those of the instruction, and elite ones of every query head."""


class Model(NamedTuple):
    """Attention heads of one layer."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_size: int


MODELS = (Model("tiny-docvqa", 8, 2, 32), Model("Qwen2-VL-7B", 28, 4, 128))


class Case(NamedTuple):
    """One operation on one input, both ways."""

    operation: str
    native: Callable[[], Any]
    torch: Callable[[], Any]


def transposed_layout(head_size: int) -> PageLayout:
    """Keys as [D, block_size], values as [block_size, D]: how vLLM keeps a page without AMX."""
    numel = BLOCK_SIZE * head_size
    places = torch.arange(numel)
    keys = places.view(head_size, BLOCK_SIZE).t().flatten()
    return PageLayout(BLOCK_SIZE, head_size, keys, places + numel)


def in_torch(operation: Callable, *args: Any, **options: Any) -> Any:
    """A definition on keys that torch reads out of the pages first."""
    read = (
        reference.read_prompt(arg, "key") if isinstance(arg, PromptPages) else arg for arg in args
    )
    return operation(*read, **options)


def both_ways(name: str, *args: Any, **options: Any) -> Case:
    """An operation by its name; both are called alike but for the keys."""
    return Case(
        name,
        functools.partial(getattr(native, name), *args, **options),
        functools.partial(in_torch, getattr(reference, name), *args, **options),
    )


def cases(model: Model, num: int, length: int, chunk: int) -> Iterator[Case]:
    """All operations on ``num`` prompts of ``length`` tokens; column sums of the last ``chunk``."""
    generator = torch.Generator().manual_seed(length)
    layout = transposed_layout(model.head_size)
    num_blocks = -(-length // BLOCK_SIZE)
    shape = (num * num_blocks * model.num_kv_heads, 2 * BLOCK_SIZE * model.head_size)
    pages = torch.randn(shape, generator=generator).bfloat16()
    table = torch.randperm(num * num_blocks, generator=generator).view(num, num_blocks)
    prompts = PromptPages(pages, table, model.num_kv_heads, layout)
    heads = (model.num_q_heads, model.head_size)
    queries = torch.randn(num, chunk, *heads, generator=generator).bfloat16()
    windows, lens = queries[:, -WINDOW:], torch.full((num,), length)
    scale = torch.full((num,), model.head_size**-0.5)
    yield both_ways("window_scores", windows, prompts, lens, scale)

    mean, last = native.window_scores(windows, prompts, lens, scale)
    scored, capacity = lens - WINDOW, torch.full((num,), CAPACITY)
    yield both_ways("bacon_evidence", mean, last, scored, kernel=5, pool="avg")
    base, evidence = native.bacon_evidence(mean, last, scored, kernel=5, pool="avg")
    options = {"trace_r": TRACE, "mode": "elt", "local_k": 5, "lambda_c": 0.5, "topk_frac": 2.0}
    trace = torch.stack([evidence.roll(layer, 2) for layer in range(TRACE, -1, -1)])
    calibrate = both_ways("bacon_calibrate", base, evidence, trace, scored, capacity, **options)
    yield calibrate

    final = calibrate.native()
    yield both_ways("head_counts", base, capacity, True)

    count = torch.full((num, model.num_kv_heads), CAPACITY + WINDOW)
    yield both_ways("select_tokens", final, count, scored, lens, CAPACITY + WINDOW)

    rows, positions = torch.full((num,), chunk), lens - chunk
    yield both_ways("key_attention_sum", queries, rows, positions, prompts, scale)
    mean = torch.randn(num, *heads, generator=generator)
    outer = mean[..., None] * mean[:, :, None]
    gaussian = (mean, outer, prompts, scale)
    yield Case(
        "gaussian_logits",
        functools.partial(native.gaussian_logits, *gaussian),
        functools.partial(reference_paged.gaussian_logits, *gaussian),
    )
    yield from row_cases(model, prompts, lens)


def row_cases(model: Model, prompts: PromptPages, lens: torch.Tensor) -> Iterator[Case]:
    """Operations on rows of proxies, and of an instruction after one image."""
    num, length = len(lens), int(lens[0])
    scale = torch.full((num,), model.head_size**-0.5)
    generator = torch.Generator().manual_seed(length)
    heads = (model.num_q_heads, model.head_size)
    proxies = torch.randn(num, PROXIES, *heads, generator=generator).bfloat16()
    masses = both_ways("group_attention_sum", proxies, prompts, lens, GROUPS, scale)
    yield masses
    yield both_ways("cover_votes", masses.native(), lens, TAU, "floor")

    rows, texts = proxies[:, :KEPT_QUERIES], torch.full((num,), INSTRUCTION)
    yield both_ways("last_row_logits", rows, prompts, lens, texts, scale)

    elite = torch.zeros(num, model.num_q_heads, KEPT_QUERIES, dtype=torch.bool)
    elite[:, :, -4 * ELITE :: 4] = True
    segment = torch.zeros(num, prompts.block_table.shape[1] * BLOCK_SIZE, dtype=torch.int64)
    segment[:, length - INSTRUCTION :] = -1
    yield both_ways("elite_attention", rows, elite, segment, prompts, lens, scale)


def check(case: Case) -> None:
    """Raises:
    AssertionError: the two ways disagree.
    """
    torch.testing.assert_close(case.native(), case.torch(), rtol=1e-4, atol=1e-6)


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of both, in turns; the first pair warms up."""
    found: dict[str, list[float]] = {"native": [], "torch": []}
    for number in range(rounds + 1):
        for way in ("native", "torch"):
            start = time.perf_counter()
            getattr(case, way)()
            if number:
                found[way].append(1000 * (time.perf_counter() - start))
    return found


def environment() -> dict[str, Any]:
    """Hardware and versions, for every row."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names[0] if names else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm_kvcompress": version("vllm-kvcompress"),
    }


def percentiles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000, 4000, 16000])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--chunk", type=int, default=256, help="query rows of key_attention_sum")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", type=int, default=32000, help="largest batch * length")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    assert native.available(), "the C++ operations were not built"
    facts = environment()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"cpu_kernels_{facts['date']}.csv"
    print(f"{'':50}{'C++':>12}{'torch':>12}{'torch / C++':>24}")
    with file.open("w", newline="") as sink:
        writer = None
        for threads in args.threads:
            torch.set_num_threads(threads)
            for model, num, length in (
                (model, num, length)
                for model in MODELS
                for num in args.batches
                for length in args.lengths
                if num * length <= args.tokens
            ):
                for case in cases(model, num, length, args.chunk):
                    check(case)
                    found = measure(case, args.rounds)
                    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
                    row = facts | {"threads": threads, "model": model.name, "prompts": num}
                    row |= {"tokens": length, "operation": case.operation, "samples": args.rounds}
                    for name, values in (*found.items(), ("ratio", ratios)):
                        for q, value in zip((20, 50, 80), percentiles(values), strict=True):
                            row[f"{name}_p{q}"] = f"{value:.4g}"
                    if writer is None:
                        writer = csv.DictWriter(sink, row, lineterminator="\n")
                        writer.writeheader()
                    writer.writerow(row)
                    shape = f"{model.name} {num} x {length}, {threads} threads"
                    print(
                        f"{shape:34}{case.operation:16}{row['native_p50']:>9} ms"
                        f"{row['torch_p50']:>9} ms{row['ratio_p50']:>8} "
                        f"[{row['ratio_p20']}, {row['ratio_p80']}]",
                        flush=True,
                    )
    print(f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")


if __name__ == "__main__":
    main()
