# SPDX-License-Identifier: Apache-2.0
"""Time of every tensor operation of compression, beside the least time its bytes and FLOPs need.

    python benchmarks/kernel_bench.py --out kernels.csv          # on a GPU
    python benchmarks/kernel_bench.py --device cpu --quick --out kernels.csv

One layer of N prompts of T tokens, bfloat16, random pages all over the pool, L2 flushed before
every call. ``ours`` is what the plugin runs on this device; ``torch`` is the plain definition;
``einsum`` and ``topk`` are what one would write without either. Where the plain definition fits
into memory its result is compared first, and a wrong result ends the run without a number.

The floor of an operation is its bytes, every input read once and every output written once, over
the bandwidth of a large copy, or its FLOPs over the rate of a large matrix product, whichever takes
longer; both rates are measured in the same run.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from gpucheck.machine import facts
from operations import OPERATIONS, Operation, Shape, make_inputs
from row_operations import ROW_OPERATIONS

MODELS = {  # query heads, KV heads, head size
    "qwen2-vl-7b": (28, 4, 128),
    "llava-next-mistral-7b": (32, 8, 128),
    "llava-v1.6-vicuna-7b": (32, 32, 128),
    "qwen3-vl-30b-a3b": (32, 4, 128),
}
QUICK_MODELS = {"tiny": (4, 2, 16)}
LENGTHS, BATCHES = (2048, 8192, 32768, 131072), (1, 8, 32)
QUICK_LENGTHS, QUICK_BATCHES = (96, 256), (1, 3)

MILLISECONDS = 30.0  # spent on one entry, about
FEWEST, MOST = 5, 50  # calls per entry


class Machine(NamedTuple):
    """Rates reached here: bytes and FLOPs per second."""

    bandwidth: float
    flops: float


class Timer:
    """Times of a call in milliseconds, the caches cold."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.quick = quick
        size = (1 if quick else 256) << 20  # larger than any L2
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return 1000 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def __call__(self, call: Callable[[], object]) -> list[float]:
        for _ in range(1 if self.quick else 3):  # compiles, fills caches of allocators
            guess = self.once(call)
        count = int(MILLISECONDS / max(guess, 1e-3))
        count = 2 if self.quick else min(max(count, FEWEST), MOST)
        return [self.once(call) for _ in range(count)]


def measure_machine(timer: Timer, device: torch.device) -> Machine:
    """Bandwidth of a large copy and rate of a large bfloat16 matrix product."""
    side = 256 if timer.quick else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = statistics.median(timer(lambda: a @ b)) / 1000
    flops = 2 * side**3 / seconds
    source = torch.empty((1 if timer.quick else 1024) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(timer(lambda: target.copy_(source))) / 1000
    return Machine(2 * source.numel() / seconds, flops)


def shapes(quick: bool, names: list[str]) -> Iterator[Shape]:
    """Small ones first, so that a run out of time still has something of every model."""
    models = QUICK_MODELS if quick else {name: MODELS[name] for name in names or MODELS}
    for length in QUICK_LENGTHS if quick else LENGTHS:
        for num in QUICK_BATCHES if quick else BATCHES:
            for name, heads in models.items():
                yield Shape(name, *heads, length, num)


def room(device: torch.device) -> float:
    """Bytes that one case may take."""
    if device.type == "cpu":
        return 1e9
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 0.8 * (torch.cuda.mem_get_info()[0] + cached)


def measure(
    operation: Operation, shape: Shape, inputs, timer: Timer, machine: Machine, device: torch.device
) -> Iterator[dict[str, object]]:
    """Rows of one operation, every implementation that fits into memory.

    Raises:
        AssertionError: ours differs from the plain definition.
    """
    cost = operation.cost(shape)
    floor = 1e6 * max(cost.bytes / machine.bandwidth, cost.flops / machine.flops)
    fits = cost.plain_bytes < room(device)
    if fits:
        operation.check(inputs)
    for name, call in operation.implementations(inputs).items():
        if name != "ours" and not fits:
            continue
        times = [1000 * ms for ms in timer(call)]
        cuts = statistics.quantiles(times, n=10, method="inclusive")
        yield shape._asdict() | {
            "operation": operation.name,
            "implementation": name,
            "checked": fits,
            "samples": len(times),
            "p20_us": cuts[1],
            "p50_us": statistics.median(times),
            "p80_us": cuts[7],
            "bytes": cost.bytes,
            "flops": cost.flops,
            "floor_us": floor,
            "times_floor": statistics.median(times) / floor,
            "copy_gb_per_s": machine.bandwidth / 1e9,
            "matmul_tflop_per_s": machine.flops / 1e12,
        }


def run(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    timer = Timer(device, args.quick)
    machine = measure_machine(timer, device)
    print(f"copy {machine.bandwidth / 1e9:.0f} GB/s, matmul {machine.flops / 1e12:.1f} TFLOP/s")
    end = time.monotonic() + args.seconds
    for shape in shapes(args.quick, args.models):
        if shape.held_bytes > room(device):
            print(f"left out: {shape}: its inputs take {shape.held_bytes / 2**30:.0f} GiB")
            continue
        if time.monotonic() > end:
            print(f"left out: {shape}: the {args.seconds:.0f} seconds are over")
            continue
        inputs = make_inputs(shape, device)
        for operation in (*ROW_OPERATIONS, *OPERATIONS):
            yield from measure(operation, shape, inputs, timer, machine, device)
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--models", nargs="*", default=[], choices=MODELS, metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no case after these")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --quick only shows that this runs")
    device = torch.device(args.device)
    known = facts(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    with args.out.open("w", newline="") as sink, torch.inference_mode():
        for row in run(args, device):
            entry = known | row
            if writer is None:
                writer = csv.DictWriter(sink, entry, lineterminator="\n")
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in entry.items()}
            )
            sink.flush()
            print(
                f"{row['model']:22} T {row['length']:6} N {row['num']:2} {row['operation']:16} "
                f"{row['implementation']:6} {row['p50_us']:10.1f} us "
                f"{row['times_floor']:9.1f} x floor",
                flush=True,
            )


if __name__ == "__main__":
    main()
