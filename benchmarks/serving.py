# SPDX-License-Identifier: Apache-2.0
"""What compression costs and gives, measured in pairs against the same vLLM without it.

    python benchmarks/serving.py

Two engines live side by side, one per process, and take turns (stock, compressed, compressed,
stock, ...), so that whatever else the machine does meets both. Three workloads:

    tight    a pool that holds few uncompressed prompts: tokens/s and most requests running at once
    roomy    a pool that is never short: compression must not cost much
    single   one prompt at a time: prefill, scoring + compaction, pages held against pages needed

Results: a table, and one CSV row per quantity with hardware, versions and percentiles.
"""

import argparse
import csv
import datetime
import itertools
import logging
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("stock", "compressed")
MAX_SEQS = 32


@dataclass(frozen=True)
class Settings:
    """What both engines of a pair have in common, and the compression of one of them."""

    model: str
    method: str
    budget: str
    block_size: int
    pool_blocks: int
    threads: int


@dataclass(frozen=True)
class Burst:
    """Requests that arrive at once."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seed: int


class Row(NamedTuple):
    """One measured quantity; ``values`` has one entry per repetition."""

    workload: str
    arm: str
    quantity: str
    unit: str
    values: list[float]


def random_prompts(burst: Burst) -> list[list[int]]:
    """Token ids of printable characters; no two prompts share a prefix."""
    rng = random.Random(burst.seed)
    return [[rng.randrange(94) for _ in range(burst.prompt_tokens)] for _ in range(burst.requests)]


# in the process of an engine


class Engine:
    """An engine inside this process, where scheduler, block pool and worker are within reach."""

    def __init__(self, settings: Settings, arm: str) -> None:
        from vllm import LLM

        self.compresses = arm == "compressed"
        compression = {"method": settings.method, "budget": settings.budget}
        llm = LLM(
            settings.model,
            additional_config={"kv_compression": compression} if self.compresses else {},
            block_size=settings.block_size,
            max_model_len=2048,
            num_gpu_blocks_override=settings.pool_blocks,
            kv_cache_memory_bytes=64 << 20,
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        self.engine = llm.llm_engine
        self.core = self.engine.engine_core.engine_core
        self.names = (str(number) for number in itertools.count())

    def add(self, prompt: list[int], output_tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        return self.engine.add_request(next(self.names), {"prompt_token_ids": prompt}, params)

    def burst(self, burst: Burst) -> dict[str, float]:
        """Serve a burst to its end."""
        for prompt in random_prompts(burst):
            self.add(prompt, burst.output_tokens)
        peak = steps = 0
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
            peak = max(peak, len(self.core.scheduler.running))
            steps += 1
        seconds = time.perf_counter() - start
        return {
            "tokens_per_s": burst.requests * burst.output_tokens / seconds,
            "peak_running": peak,
            "steps": steps,
        }

    def single(self, burst: Burst) -> dict[str, float]:
        """Serve one prompt: time of the step that prefills it, and its pages once it decodes."""
        (prompt,) = random_prompts(burst)
        before = self.compression_seconds()
        request = self.add(prompt, output_tokens=4)
        start = time.perf_counter()
        self.engine.step()
        result = {"prefill_ms": 1000 * (time.perf_counter() - start)}
        self.engine.step()  # the first decode step, in which the scheduler has freed blocks
        result["blocks_held"] = self.blocks(request)
        if self.compresses:
            result["compression_ms"] = 1000 * (self.compression_seconds() - before)
            result |= self.pages(request)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return result

    def compression_seconds(self) -> float:
        """The sum of the histogram vllm:kv_compression_seconds."""
        from vllm_kvcompress.config import metrics_dir
        from vllm_kvcompress.metrics import totals

        directory = metrics_dir()
        return totals(directory)["seconds_sum"] if directory else 0.0

    def blocks(self, request: str) -> int:
        """Blocks of the pool that a request holds."""
        (manager,) = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        return sum(not block.is_null for block in manager.req_to_blocks[request])

    def pages(self, request: str) -> dict[str, float]:
        """Head pages of a running request, and its kept tokens, mean over layers and heads.

        Held: its blocks in the pool, times the head pages of a block. Needed: as many as its tokens
        fill, by the kept tokens of every layer and head, and by the budget that was asked for.
        """
        from vllm_kvcompress.adapter.runner import _states
        from vllm_kvcompress.config import Budget

        worker = self.core.model_executor.driver_worker.worker
        (group,) = worker.model_runner.attn_groups[0]
        builder = group.metadata_builders[0]
        state, size = builder.state, builder.block_size
        layers, heads = len(builder.layer_rows), builder.num_kv_heads

        computed = self.core.scheduler.requests[request].num_computed_tokens
        prompt = self.core.scheduler.requests[request].num_prompt_tokens
        after_pages = computed - prompt // size * size  # tail and answer, in natural layout

        (slot,), _ = _states[worker.model_runner].slots.assign([request])
        kept = state.page_count[:, slot].expand(layers, heads) * size + after_pages
        budget = Budget.parse(builder.settings.budget)
        asked = budget.tokens if budget.ratio is None else math.ceil(budget.ratio * prompt)
        return {
            "kept_tokens": float(kept.double().mean()) - (computed - prompt),
            "pages_held": self.blocks(request) * layers * heads,
            "pages_for_kept": int((-(-kept // size)).sum()),
            "pages_for_budget": -(-(asked + computed - prompt) // size) * layers * heads,
        }


def serve(pipe: Any, settings: Settings, arm: str) -> None:
    """Process of one engine: answer bursts until the pipe closes."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        OMP_NUM_THREADS=str(settings.threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )
    logging.disable(logging.WARNING)
    engine = Engine(settings, arm)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        kind, burst = order
        pipe.send(getattr(engine, kind)(burst))


# in the process that measures


class Pair:
    """A stock and a compressing engine of equal settings, alive at the same time."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for arm in ARMS:
            self.pipes[arm], end = context.Pipe()
            process = context.Process(target=serve, args=(end, settings, arm), daemon=True)
            process.start()
            end.close()  # ours: recv() then fails when the process ends
            self.processes.append(process)

    def __enter__(self) -> "Pair":
        for pipe in self.pipes.values():
            assert pipe.recv() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes.values(), self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join(30)
            process.kill()

    def run(self, arm: str, kind: str, burst: Burst) -> dict[str, float]:
        self.pipes[arm].send((kind, burst))
        return self.pipes[arm].recv()

    def repeat(
        self, kind: str, rounds: int, **burst: int
    ) -> Iterator[tuple[str, dict[str, list[float]]]]:
        """Both arms in turns, every round with its own prompts; yields the values of each arm."""
        values: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
        for number in range(-1, rounds):  # the first one warms up
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                result = self.run(arm, kind, Burst(seed=number, **burst))
                for quantity, value in result.items() if number >= 0 else ():
                    values[arm].setdefault(quantity, []).append(value)
        yield from values.items()


UNITS = {"tokens_per_s": "1/s", "prefill_ms": "ms", "compression_ms": "ms"}


def as_rows(workload: str, measured: Iterator[tuple[str, dict[str, list[float]]]]) -> list[Row]:
    """Rows of both arms, and the ratio of what is measured in both, round by round."""
    arms = dict(measured)
    rows = [
        Row(workload, arm, quantity, UNITS.get(quantity, "1"), values)
        for arm, quantities in arms.items()
        for quantity, values in quantities.items()
    ]
    stock, ours = arms["stock"], arms["compressed"]
    for quantity in ("tokens_per_s", "prefill_ms"):
        if quantity in stock:
            pairs = zip(ours[quantity], stock[quantity], strict=True)
            rows.append(
                Row(workload, "compressed / stock", quantity, "ratio", [a / b for a, b in pairs])
            )
    if "pages_held" in ours:
        for needed in ("pages_for_kept", "pages_for_budget"):
            pairs = zip(ours["pages_held"], ours[needed], strict=True)
            name = f"pages_held / {needed}"
            rows.append(Row(workload, "compressed", name, "ratio", [a / b for a, b in pairs]))
        pairs = zip(ours["compression_ms"], stock["prefill_ms"], strict=True)
        name = "compression_ms / stock prefill_ms"
        rows.append(Row(workload, "compressed", name, "ratio", [a / b for a, b in pairs]))
    return rows


def measure(args: argparse.Namespace) -> Iterator[tuple[Settings, list[Row]]]:
    def settings(pool_blocks: int) -> Settings:
        return Settings(
            args.model, args.method, args.budget, args.block_size, pool_blocks, args.threads
        )

    load = {"requests": 24, "prompt_tokens": 1000, "output_tokens": 64}
    per_request = -(-(load["prompt_tokens"] + load["output_tokens"]) // args.block_size)
    tight = settings(3 * per_request + per_request // 2)
    print(f"starting two engines with a pool of {tight.pool_blocks} blocks", flush=True)
    with Pair(tight) as pair:
        yield tight, as_rows("tight", pair.repeat("burst", args.rounds, **load))
    roomy = settings(MAX_SEQS * per_request)
    print(f"starting two engines with a pool of {roomy.pool_blocks} blocks", flush=True)
    with Pair(roomy) as pair:
        yield roomy, as_rows("roomy", pair.repeat("burst", args.rounds, **load))
        for length in (500, 1000, 2000):
            one = {"requests": 1, "prompt_tokens": length, "output_tokens": 4}
            measured = pair.repeat("single", 3 * args.rounds, **one)
            yield roomy, as_rows(f"single {length}", measured)


def environment() -> dict[str, Any]:
    """Hardware and versions, for every row."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": version("vllm"),
        "vllm_kvcompress": version("vllm-kvcompress"),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny-docvqa" / "model"))
    parser.add_argument("--method", default="bacon")
    parser.add_argument("--budget", default="64")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of each engine; 1 disturbs least")
    parser.add_argument("--rounds", type=int, default=10, help="repetitions per arm; even")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    facts = environment()
    file = args.out / f"cpu_{facts['date']}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    writer = None
    with file.open("w", newline="") as sink:
        for settings, rows in measure(args):
            shared = facts | asdict(settings) | {"model": Path(settings.model).parent.name}
            for row in rows:
                entry = shared | row._asdict() | percentiles(row.values)
                entry["samples"] = len(entry.pop("values"))
                if writer is None:
                    writer = csv.DictWriter(sink, entry, lineterminator="\n")
                    writer.writeheader()
                rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in entry.items()}
                writer.writerow(rounded)
                print(
                    f"{row.workload:12} {row.arm:19} {row.quantity:34} "
                    f"{entry['p50']:9.4g} {row.unit:6} "
                    f"[{entry['p20']:.4g}, {entry['p80']:.4g}]",
                    flush=True,
                )
    print(f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")


if __name__ == "__main__":
    main()
