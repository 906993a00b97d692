# SPDX-License-Identifier: Apache-2.0
"""What compression costs and gives, measured in pairs against the same vLLM without it.

    python benchmarks/serving.py                                          # toy model on the CPU
    python benchmarks/serving.py --device cuda --dummy llama-3.1-8b       # random weights on a GPU

Two engines live side by side, one per process, and take turns (stock, compressed, compressed,
stock, ...), so that whatever else the machine does meets both. Three workloads:

    tight    a pool that holds few uncompressed prompts: tokens/s and most requests running at once
    roomy    a pool that is never short: compression must not cost much
    single   one prompt at a time: prefill, scoring + compaction, pages held against pages needed

On a GPU both engines must fit into its memory side by side; vLLM runs as it does by default there:
compiled, with CUDA graphs and asynchronous scheduling.

Results: a table, and one CSV row per quantity with hardware, versions and percentiles.
"""

import argparse
import csv
import functools
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from gpucheck.machine import facts
from serving_engine import Burst, Engine, EngineProcess, Settings

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("stock", "compressed")
WORKLOADS = ("tight", "roomy")


class Row(NamedTuple):
    """One measured quantity; ``values`` has one entry per repetition."""

    workload: str
    arm: str
    quantity: str
    unit: str
    values: list[float]


class Pair:
    """A stock and a compressing engine of equal settings, alive at the same time."""

    def __init__(self, settings: Settings) -> None:
        self.engines = {
            arm: EngineProcess(functools.partial(Engine, settings, arm), settings.threads)
            for arm in ARMS
        }

    def __enter__(self) -> "Pair":
        for engine in self.engines.values():
            engine.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.__exit__()

    def repeat(
        self, kind: str, rounds: int, **burst: int
    ) -> Iterator[tuple[str, dict[str, list[float]]]]:
        """Both arms in turns, every round with its own prompts; yields the values of each arm."""
        values: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
        for number in range(-1, rounds):  # the first one warms up
            for arm in ARMS if number % 2 == 0 else reversed(ARMS):
                result = self.engines[arm].run(kind, Burst(seed=number, **burst))
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


class Plan(NamedTuple):
    """How much work a run does. Lengths in tokens.

    Attributes:
        single: prompt lengths.
        roomy_for: requests that the pool of "roomy" holds uncompressed.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    single: tuple[int, ...]
    rounds: int
    roomy_for: int


PLANS = {
    "cpu": Plan(24, 1000, 64, (500, 1000, 2000, 4000), 10, 32),
    "cuda": Plan(16, 8192, 512, (2048, 8192, 32768), 4, 16),
    "quick": Plan(5, 300, 6, (200,), 1, 5),  # does it run at all?
}


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of the device, or --quick, with what the command line changes."""
    plan = PLANS["quick" if args.quick else args.device]
    asked = {name: getattr(args, name) for name in plan._fields if name in args}
    return plan._replace(**{name: value for name, value in asked.items() if value is not None})


def measure(args: argparse.Namespace, plan: Plan) -> Iterator[tuple[Settings, list[Row]]]:
    longest = max(plan.prompt_tokens + plan.output_tokens, *plan.single) + 64
    per_request = -(-(plan.prompt_tokens + plan.output_tokens) // args.block_size)
    pools = {
        "tight": 3 * per_request + per_request // 2,
        "roomy": max(plan.roomy_for * per_request, -(-longest // args.block_size) + 1),
    }
    load = {name: getattr(plan, name) for name in ("requests", "prompt_tokens", "output_tokens")}
    for workload in args.workloads:
        pool = pools[workload]
        settings = Settings(
            model=args.model,
            method=args.method,
            budget=args.budget,
            block_size=args.block_size,
            pool_blocks=pool,
            threads=args.threads,
            load_format="dummy" if args.dummy else "auto",
            max_model_len=min(longest, (pool - 1) * args.block_size),  # vLLM sets a block apart
            device=args.device,
        )
        print(f"starting two engines with a pool of {pool} blocks", flush=True)
        with Pair(settings) as pair:
            yield settings, as_rows(workload, pair.repeat("burst", plan.rounds, **load))
            lengths = plan.single if workload == args.workloads[-1] else ()
            for length in lengths:
                if length + 64 > settings.max_model_len:
                    continue
                one = {"requests": 1, "prompt_tokens": length, "output_tokens": 6}
                measured = pair.repeat("single", 3 * plan.rounds, **one)
                yield settings, as_rows(f"single {length}", measured)


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder of a checkpoint; default: the one of examples/")
    model.add_argument("--dummy", metavar="NAME", help="a model of dummy_models.py instead")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS,
                        help="the engines of the last one do single, too")  # fmt: skip
    parser.add_argument("--method", default="bacon")
    parser.add_argument("--budget", help="default: 64 tokens on a CPU, 25%% on a GPU")
    parser.add_argument("--block-size", type=int, help="default: 32 on a CPU, 16 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; 1 disturbs least")
    parser.add_argument("--rounds", type=int, help="repetitions per arm; even")
    parser.add_argument("--requests", type=int, help="of tight and roomy")
    parser.add_argument("--prompt-tokens", type=int, help="of tight and roomy")
    parser.add_argument("--output-tokens", type=int, help="of tight and roomy")
    parser.add_argument("--single", type=int, nargs="*", help="prompt lengths of single")
    parser.add_argument("--quick", action="store_true", help="tiny bursts: does it run at all?")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.budget = args.budget or ("25%" if on_gpu else "64")
    args.block_size = args.block_size or (16 if on_gpu else 32)
    if args.dummy:
        from dummy_models import make

        args.model = str(make(args.dummy, ROOT / ".cache" / "dummy", shrunk=args.quick))
    args.model = args.model or str(ROOT / "examples" / "tiny-docvqa" / "model")
    return args


def main() -> None:
    args = parse()
    known = facts(args.device)
    file = args.out / f"{args.device}_{known['date']}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    writer = None
    with file.open("w", newline="") as sink:
        for settings, rows in measure(args, plan_of(args)):
            folder = Path(settings.model)
            model = folder.parent.name if folder.name == "model" else folder.name
            shared = known | asdict(settings) | {"model": model, "device": known["device"]}
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
