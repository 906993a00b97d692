# SPDX-License-Identifier: Apache-2.0
"""Where the time of a compression goes, in a real engine: launches, host and device.

    python -m gpucheck.profile_step --out DIR       # Qwen2-VL-7B, one prompt of 8,192 tokens
    python -m gpucheck.profile_step --out DIR --small --device cpu

The worker compresses all layers of a prompt in one call before the step after its prefill. For each
method the call is timed in some requests as it is

    host_ms     until it returns: nothing waits for the device
    stream_ms   on the device, from the first launch to the end of the last kernel, gaps included

and one call more is profiled: ``kernel_ms`` is the sum of its kernels, and the table that is
written names them all. ``prefill_ms`` is the time to the first token of the same requests.
"""

import argparse
import contextlib
import csv
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

METHODS = ("bacon+adakv", "bacon")
MODEL = "qwen2-vl-7b"
OUTPUT_TOKENS = 6
SLOWEST = 5  # kernels of the headline


class Load(NamedTuple):
    """Requests for each method, one after the other; one more is profiled."""

    tokens: int
    budget: str
    warm: int
    timed: int


FULL, SMALL = Load(8192, "10%", 2, 6), Load(256, "25%", 1, 1)


class Compressions:
    """Times the compressions of this process, or profiles the next one.

    Attributes:
        host_ms, stream_ms: of every call so far.
        profile: of the call during which ``profiles`` was True.
    """

    def __init__(self, on_gpu: bool) -> None:
        import torch

        from vllm_kvcompress.adapter.layers import CompressedLayers

        self.torch, self.on_gpu = torch, on_gpu
        self.host_ms: list[float] = []
        self.stream_ms: list[float] = []
        self.profile: Any = None
        self.profiles = False
        original = CompressedLayers.compress

        def compress(layers: CompressedLayers, orders: Any) -> None:
            with self._profiled() if self.profiles else self._timed():
                original(layers, orders)

        CompressedLayers.compress = compress  # type: ignore[method-assign]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        if self.on_gpu:
            before, after = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
        start = time.perf_counter()
        yield
        self.host_ms.append(1000 * (time.perf_counter() - start))
        if self.on_gpu:
            after.record()
            after.synchronize()
            self.stream_ms.append(before.elapsed_time(after))

    @contextlib.contextmanager
    def _profiled(self) -> Iterator[None]:
        activities = self.torch.profiler.supported_activities()
        self._wait()
        with self.torch.profiler.profile(activities=activities) as profile:
            yield
            self._wait()
        self.profile = profile

    def _wait(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()


def kernels_of(profile: Any) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds by kernel, copies and fills included."""
    from torch.autograd import DeviceType

    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            count, ms = found.get(event.name, (0, 0.0))
            found[event.name] = count + 1, ms + event.device_time_total / 1000
    return found


def measure(engine: Any, calls: Compressions, load: Load) -> tuple[dict[str, Any], str]:
    """Numbers of one method, and the profiler's table."""
    from serving_engine import Burst

    def serve(seed: int) -> float:
        return engine.single(Burst(1, load.tokens, OUTPUT_TOKENS, seed))["first_token_ms"]

    for number in range(load.warm):
        serve(number)
    calls.host_ms.clear()
    calls.stream_ms.clear()
    prefill = [serve(load.warm + number) for number in range(load.timed)]
    found = len(calls.host_ms)
    assert found == load.timed, f"{found} compressions of {load.timed} prompts"
    calls.profiles = True
    serve(-1)
    calls.profiles = False
    kernels = kernels_of(calls.profile)
    slowest = sorted(kernels.items(), key=lambda item: -item[1][1])[:SLOWEST]
    row = {
        "launches": sum(count for count, _ in kernels.values()),
        "host_ms": statistics.median(calls.host_ms),
        "stream_ms": statistics.median(calls.stream_ms) if calls.stream_ms else "",
        "kernel_ms": sum(ms for _, ms in kernels.values()),
        "prefill_ms": statistics.median(prefill),
        "slowest": "; ".join(f"{name[:30]} {1000 * ms:.0f} us" for name, (_, ms) in slowest),
    }
    sort = "self_cuda_time_total" if calls.on_gpu else "self_cpu_time_total"
    averages = calls.profile.key_averages()
    return row, averages.table(sort_by=sort, row_limit=120, max_name_column_width=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="two narrow layers, a short prompt")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives here, to be looked at
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

    from dummy_models import make
    from serving import ROOT
    from serving_engine import Engine, Settings

    from vllm_kvcompress.config import KVCompressionConfig

    on_gpu = args.device == "cuda"
    load, size = SMALL if args.small else FULL, 16 if on_gpu else 32
    model = make(MODEL, ROOT / ".cache" / "dummy", shrunk=args.small)
    settings = Settings(
        model=str(model), method=METHODS[0], budget=load.budget, block_size=size,
        pool_blocks=4 * -(-load.tokens // size), threads=1, load_format="dummy",
        max_model_len=load.tokens + 128, device=args.device, start="eager",
    )  # fmt: skip
    calls = Compressions(on_gpu)
    engine = Engine(settings, "always")
    worker = engine.core.model_executor.driver_worker.worker.compressed_layers
    with (args.out / "profile.csv").open("w", newline="") as sink:
        writer = None
        for method in METHODS:
            config = KVCompressionConfig.parse({"method": method, "budget": load.budget})
            planner = replace(worker.planner, config=config)
            worker.configure(planner)  # no graph knows its tensors: the engine is eager
            engine.scheduler.compression.manager.compressed.configure(planner)
            row, table = measure(engine, calls, load)
            line = {"method": method, "tokens": load.tokens, "layers": worker.num_layers} | {
                key: f"{value:.4g}" if isinstance(value, float) else value
                for key, value in row.items()
            }
            writer = writer or csv.DictWriter(sink, line, lineterminator="\n")
            if sink.tell() == 0:
                writer.writeheader()
            writer.writerow(line)
            sink.flush()
            (args.out / f"profile-{method}.txt").write_text(table)
            print("==", ", ".join(f"{key} {value}" for key, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
