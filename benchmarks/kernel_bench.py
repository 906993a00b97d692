# SPDX-License-Identifier: Apache-2.0
"""Time of every tensor operation of compression, beside the least time its bytes and FLOPs need.

    python benchmarks/kernel_bench.py --out kernels.csv          # on a GPU
    python benchmarks/kernel_bench.py --device cpu --quick --out kernels.csv

One layer of N prompts of T tokens, bfloat16, random pages all over the pool, L2 flushed before
every call; "compress" is all layers in one call, as a worker makes it. Decode attention is replayed
from a CUDA graph, as engines do it. Implementations:

    ours         what the plugin runs on this device, or would run (paged_decode)
    stock        vLLM's own decode attention over as many bytes
    torch        the plain definition
    einsum       the code path of projects around SnapKV, from contiguous keys and values
    kvpress      its SnapKV press, from the same
    topk         torch's, positions sorted
    flash-attn   vLLM's own kernel over the per-head batch; "+tables": tables built in every layer
    flashinfer   its batched decode over the per-head batch
    xformers     its split-K decode over the per-head batch
    row, tile, cuda   candidates for "ours" in select_tokens; the row "fastest" says which won
    copy         a device copy that reads half of the operation's bytes and writes as many; for
                 select_tokens, of the scores

A run on a CPU only shows that this runs: pages are laid out as on a GPU, which the C++ operations
do not take. ``cpu_kernels.py`` times those.

Where the plain definition fits into memory its result is compared first. A wrong result has no
number but a note, as has all that fails; the run goes on and ends with an error. Every row is on
disk when it is measured. Beside the device's times, ``host_us`` is how long the host was busy.

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
from decode_operations import decode_operations
from gpucheck.machine import facts, installed_version
from operations import OPERATIONS, PLAIN, Cost, Operation, Shape, make_inputs
from rivals import FAILURES, Absent, Calls, Rival
from row_operations import ROW_OPERATIONS
from whole_call import WHOLE_CALLS

MODELS = {  # query heads, KV heads, head size; layers
    "qwen2-vl-7b": (28, 4, 128, 28),
    "llava-next-mistral-7b": (32, 8, 128, 32),
    "llava-v1.6-vicuna-7b": (32, 32, 128, 32),
    "qwen3-vl-30b-a3b": (32, 4, 128, 48),
}
QUICK_MODELS = {"tiny": (4, 2, 16, 2)}
LENGTHS, BATCHES = (2048, 8192, 32768, 131072), (1, 8, 32)
QUICK_LENGTHS, QUICK_BATCHES = (96, 256), (1, 3)

MILLISECONDS = 10.0  # spent on one entry, about
FEWEST, MOST = 3, 40  # calls per entry

Row = dict[str, object]

FAILED = "failed: "
HEADLINES = ("compress", "ours"), ("paged_decode", "flash-attn")
"""Operation and implementation of rows that a summary shows."""


class Machine(NamedTuple):
    """Rates reached here: bytes and FLOPs per second."""

    bandwidth: float
    flops: float


class Time(NamedTuple):
    """Of a call in milliseconds: on the device, and until it returned to the host."""

    device: float
    host: float


class Timer:
    """Times of a call, the caches cold."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.on_gpu = device.type == "cuda"
        self.quick = quick
        size = (1 if quick else 256) << 20  # larger than any L2
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> Time:
        self.flush.zero_()
        if self.on_gpu:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
        start = time.perf_counter()
        call()
        host = 1000 * (time.perf_counter() - start)
        if not self.on_gpu:
            return Time(host, host)
        after.record()
        after.synchronize()
        return Time(before.elapsed_time(after), host)

    def __call__(self, call: Callable[[], object]) -> list[Time]:
        self.once(call)  # compiles, fills caches of allocators
        guess = self.once(call).device
        count = int(MILLISECONDS / max(guess, 1e-3))
        count = 2 if self.quick else min(max(count, FEWEST), MOST)
        return [self.once(call) for _ in range(count)]

    def replayed(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph; without a GPU the call itself."""
        if not self.on_gpu:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # what is compiled or allocated once stays out of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def median(times: list[Time]) -> float:
    """On the device, in milliseconds."""
    return statistics.median(time.device for time in times)


def measure_machine(timer: Timer, device: torch.device) -> Machine:
    """Bandwidth of a large copy and rate of a large bfloat16 matrix product."""
    side = 256 if timer.quick else 8192
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = median(timer(lambda: a @ b)) / 1000
    flops = 2 * side**3 / seconds
    source = torch.empty((1 if timer.quick else 1024) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median(timer(lambda: target.copy_(source))) / 1000
    return Machine(2 * source.numel() / seconds, flops)


def shapes(quick: bool, names: list[str]) -> Iterator[Shape]:
    """All of the first model first: a run out of time then has one that can be judged."""
    models = QUICK_MODELS if quick else {name: MODELS[name] for name in names or MODELS}
    for name, (*heads, layers) in models.items():
        for length in QUICK_LENGTHS if quick else LENGTHS:
            for num in QUICK_BATCHES if quick else BATCHES:
                yield Shape(name, *heads, length, num, layers)


def room(device: torch.device) -> float:
    """Bytes that one case may take."""
    if device.type == "cpu":
        return 1e9
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return 0.8 * (torch.cuda.mem_get_info()[0] + cached)


def copy_call(cost: Cost, device: torch.device) -> Callable[[], object]:
    source = torch.empty(max(cost.bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def entry(shape: Shape, operation: str, implementation: str, cost: Cost, machine: Machine) -> Row:
    """A row without a time."""
    return shape._asdict() | {
        "operation": operation,
        "implementation": implementation,
        "checked": False,
        "samples": 0,
        "p20_us": "",
        "p50_us": "",
        "p80_us": "",
        "host_us": "",
        "launches": "",
        "times_stock": "",
        "bytes": cost.bytes,
        "flops": cost.flops,
        "floor_us": 1e6 * max(cost.bytes / machine.bandwidth, cost.flops / machine.flops),
        "times_floor": "",
        "copy_gb_per_s": machine.bandwidth / 1e9,
        "matmul_tflop_per_s": machine.flops / 1e12,
        "note": "",
    }


def timed(row: Row, measured: list[Time]) -> Row:
    times = [1000 * each.device for each in measured]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    floor = row["floor_us"]
    assert isinstance(floor, float)
    return row | {
        "samples": len(times),
        "p20_us": cuts[1],
        "p50_us": statistics.median(times),
        "p80_us": cuts[7],
        "host_us": 1000 * statistics.median(each.host for each in measured),
        "times_floor": statistics.median(times) / floor,
    }


def prepare(
    call: Callable[[], object] | Rival, graphs: Timer | None
) -> Callable[[], object] | Absent:
    """The call to time, as a graph where ``graphs`` is to make one."""
    if not isinstance(call, Rival):
        return graphs.replayed(call) if graphs else call
    found = call.ready()
    if isinstance(found, Absent) or graphs is None:
        return found
    try:
        return graphs.replayed(found)
    except FAILURES as error:
        return Absent(f"no graph can be captured: {error}".partition("\n")[0])


def measure(
    operation: Operation,
    shape: Shape,
    inputs,
    timer: Timer,
    machine: Machine,
    device: torch.device,
    ours_only: bool,
) -> Iterator[Row]:
    """Rows of one operation, one for each implementation.

    Raises:
        AssertionError: ours differs from the plain definition.
        FAILURES: ours does not run.
    """
    cost = operation.cost(shape)
    fits = cost.plain_bytes < room(device)
    if fits:
        operation.check(inputs)
    baseline = 0.0
    calls: Calls = operation.implementations(inputs)
    calls.setdefault("copy", Rival(lambda: copy_call(cost, device), lambda copied: True))
    medians: dict[str, float] = {}  # of candidates
    for name, call in calls.items():
        if ours_only and name != "ours":
            continue
        row = entry(shape, operation.name, name, cost, machine) | {"checked": fits}
        if name in PLAIN and not fits:
            yield row | {"note": "needs more memory than there is"}
            continue
        found = prepare(call, timer if operation.replayed and name not in PLAIN else None)
        if isinstance(found, Absent):
            yield row | {"note": found.why}
        else:
            times = timer(found)
            if name in operation.candidates:
                medians[name] = median(times)
            if name == operation.baseline:
                baseline = median(times)
            if baseline:
                row["times_stock"] = median(times) / baseline
            if name == "ours" and operation.launches is not None:
                row["launches"] = operation.launches(shape)
            yield timed(row, times)
    if medians:
        row = entry(shape, operation.name, "fastest", cost, machine)
        yield row | {"checked": fits, "note": ranking(medians)}


def ranking(medians: dict[str, float]) -> str:
    """The fastest by name, and how much longer the others take."""
    first, *others = sorted(medians, key=lambda name: medians[name])
    ratios = [f"{name} takes {medians[name] / medians[first]:.2f} times as long" for name in others]
    return ": ".join([first, *filter(None, [", ".join(ratios)])])


def run(args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    timer = Timer(device, args.quick)
    machine = measure_machine(timer, device)
    print(f"copy {machine.bandwidth / 1e9:.0f} GB/s, matmul {machine.flops / 1e12:.1f} TFLOP/s")
    every = (*WHOLE_CALLS, *decode_operations(args.jit), *OPERATIONS, *ROW_OPERATIONS)
    operations = [o for o in every if not args.operations or o.kernel in args.operations]
    end = time.monotonic() + args.seconds
    over = f"the {args.seconds:.0f} seconds were over"

    def left_out(shape: Shape, operation: str, note: str) -> Row:
        return entry(shape, operation, "all", Cost(0, 0, 0), machine) | {"note": note}

    for shape in shapes(args.quick, args.models):
        if shape.held_bytes > room(device):
            gib = shape.held_bytes / 2**30
            yield left_out(shape, "all", f"its inputs take {gib:.0f} GiB")
            continue
        if time.monotonic() > end:
            yield left_out(shape, "all", over)
            continue
        inputs = make_inputs(shape, device)
        for operation in operations:
            if time.monotonic() > end:
                yield left_out(shape, operation.name, over)
                continue
            try:
                yield from measure(operation, shape, inputs, timer, machine, device, args.ours_only)
            except (AssertionError, *FAILURES) as error:
                what = f"{type(error).__name__}: {error}".partition("\n")[0]
                yield left_out(shape, operation.name, FAILED + what)
        del inputs
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--models", nargs="*", default=[], choices=MODELS, metavar="MODEL")
    parser.add_argument("--operations", nargs="*", metavar="NAME", help="some of the kernels")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing after these")
    parser.add_argument("--ours-only", action="store_true", help="no other implementation")
    parser.add_argument("--jit", action="store_true", help="FlashInfer may compile, for minutes")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --quick only shows that this runs")
    device = torch.device(args.device)
    known = facts(args.device) | {
        "flashinfer": installed_version("flashinfer-python"),
        "kvpress": installed_version("kvpress"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    writer, failures = None, 0
    with args.out.open("w", newline="") as sink, torch.inference_mode():
        for row in run(args, device):
            line = known | row
            if writer is None:
                writer = csv.DictWriter(sink, line, lineterminator="\n")
                writer.writeheader()
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()})
            sink.flush()
            failures += str(row["note"]).startswith(FAILED)
            what = str(row["operation"]).split()[0], row["implementation"]
            shown = "== " if what in HEADLINES else ""
            print(f"{shown}{describe(row)}", flush=True)
    if failures:
        sys.exit(f"{failures} operations failed")


def describe(row: Row) -> str:
    head = (
        f"{row['model']:22} T {row['length']:6} N {row['num']:2} {row['operation']:20} "
        f"{row['implementation']:17} "
    )
    if not row["samples"]:
        return f"{head}{row['note']}"
    stock = f", {row['times_stock']:.3f} x stock" if row["times_stock"] else ""
    host = f", {row['launches']} launches, host {row['host_us']:.0f} us" if row["launches"] else ""
    return f"{head}{row['p50_us']:10.1f} us {row['times_floor']:9.1f} x floor{stock}{host}"


if __name__ == "__main__":
    main()
