# SPDX-License-Identifier: Apache-2.0
"""What compression costs and gives, measured beside the same vLLM without it.

    python benchmarks/serving.py                                          # toy model on the CPU
    python benchmarks/serving.py --device cuda --dummy llama-3.1-8b       # random weights on a GPU

Two engines live side by side, one per process, stock and compressing, and take turns (stock,
compressed, compressed, stock, ...), so that whatever else the machine does meets both. Policy,
budget and size of the block pool are changed while they are idle. Workloads:

    tight           a pool that holds few uncompressed prompts; stock and ``always``
    roomy           a pool that is never short; stock, ``always`` and ``pressure``, whose answers
                    have to be those of stock: the run fails if one token differs
    oversubscribed  requests that need three times the pool, with long answers; stock and
                    ``pressure``: how many are preempted
    single          one prompt at a time, by stock and ``always``: time to its first token,
                    compression, blocks held, pages held against pages needed

On a GPU both engines must fit into its memory; vLLM runs as it does by default there: compiled,
with CUDA graphs and asynchronous scheduling.

Results: a table, and one CSV row per quantity with hardware, versions and percentiles, written as
soon as it is measured.
"""

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from gpucheck.machine import facts
from serving_engine import Burst, Engine, EngineProcess, Settings

ROOT = Path(__file__).resolve().parent.parent
POLICIES_OF = {
    "tight": ("always", "pressure"),
    "roomy": ("always", "pressure"),
    "oversubscribed": ("pressure",),
}
"""Policies of compression that a workload is served by, beside stock."""
POLICIES = ("always", "pressure")
MUST_EQUAL = ("roomy", "pressure")
"""Workload and arm in which nobody is compressed."""


class Arm(NamedTuple):
    """A way to serve: without compression, or by a policy and to a budget; "" are stock's."""

    name: str
    policy: str
    budget: str


STOCK = Arm("stock", "", "")


class Row(NamedTuple):
    """One measured quantity; ``values`` has one entry per repetition."""

    workload: str
    arm: str
    quantity: str
    unit: str
    values: list[float]


Measured = dict[str, dict[str, list[float]]]
"""Values of each arm by quantity."""


class Engines:
    """Two engines of equal settings, one of which compresses."""

    def __init__(self, settings: Settings) -> None:
        self.stock, self.ours = (
            EngineProcess(functools.partial(Engine, settings, arm), settings.threads)
            for arm in ("stock", "always")
        )

    def __enter__(self) -> "Engines":
        self.stock.__enter__()
        self.ours.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stock.__exit__()
        self.ours.__exit__()

    def limit_pool(self, blocks: int) -> None:
        for engine in (self.stock, self.ours):
            engine.run("limit_pool", blocks)

    def run(self, arm: Arm, kind: str, burst: Burst) -> dict[str, Any]:
        if arm == STOCK:
            return self.stock.run(kind, burst)
        self.ours.run("configure", {"when": arm.policy, "budget": arm.budget})
        return self.ours.run(kind, burst)

    def repeat(self, kind: str, rounds: int, arms: tuple[Arm, ...], **burst: int) -> Measured:
        """The arms in turns, every round with its own prompts."""
        values: Measured = {arm.name: {} for arm in arms}
        for number in range(-1, rounds):  # the first one warms up
            found = {
                arm.name: self.run(arm, kind, Burst(seed=number, **burst))
                for arm in (arms if number % 2 == 0 else reversed(arms))
            }
            if number < 0:
                continue
            answers = {name: result.pop("outputs", []) for name, result in found.items()}
            for name in values:
                if answers[name] and name != STOCK.name:
                    pairs = zip(answers[name], answers[STOCK.name], strict=True)
                    equal = [ours == stock for ours, stock in pairs]
                    found[name]["equal_answers"] = sum(equal) / len(equal)
                for quantity, value in found[name].items():
                    values[name].setdefault(quantity, []).append(value)
        return values


UNITS = {"tokens_per_s": "1/s", "first_token_ms": "ms", "compression_ms": "ms"}


def as_rows(workload: str, arms: Measured) -> list[Row]:
    """Rows of every arm, and ratios to stock, round by round."""
    rows = [
        Row(workload, arm, quantity, UNITS.get(quantity, "1"), values)
        for arm, quantities in arms.items()
        for quantity, values in quantities.items()
    ]

    def ratio(arm: str, quantity: str, above: list[float], below: list[float]) -> None:
        values = [a / b for a, b in zip(above, below, strict=True)]
        rows.append(Row(workload, arm, quantity, "ratio", values))

    stock = arms["stock"]
    for arm, ours in arms.items():
        if arm == "stock":
            continue
        for quantity in ("tokens_per_s", "first_token_ms"):
            if quantity in stock:
                ratio(f"{arm} / stock", quantity, ours[quantity], stock[quantity])
        if "pages_held" in ours:
            for needed in ("pages_for_kept", "pages_for_budget"):
                ratio(arm, f"pages_held / {needed}", ours["pages_held"], ours[needed])
            name = "compression_ms / stock first_token_ms"
            ratio(arm, name, ours["compression_ms"], stock["first_token_ms"])
    return rows


class Plan(NamedTuple):
    """How much work a run does. Lengths in tokens.

    Attributes:
        long_prompt_tokens, long_output_tokens: of "oversubscribed"; prompts that leave little of
            the pool, so that answers outgrow it.
        single: prompt lengths.
        rounds: of tight and roomy; "oversubscribed" has half of them.
        roomy_for: requests that the pool of "roomy" holds uncompressed.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    long_prompt_tokens: int
    long_output_tokens: int
    single: tuple[int, ...]
    rounds: int
    roomy_for: int

    def pairs(self, length: int) -> int:
        """Repetitions of "single", most of short prompts: ratios near 1 are to be told apart."""
        return max(3 * self.rounds, min(24 * self.rounds, 12_000 * self.rounds // length))


PLANS = {
    "cpu": Plan(24, 1000, 64, 800, 128, (500, 1000, 2000, 4000), 10, 32),
    "cuda": Plan(16, 8192, 512, 8000, 1024, (2048, 8192, 32768), 4, 20),
    "quick": Plan(5, 300, 6, 300, 40, (200,), 1, 7),  # does it run at all?
}


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan of the device, or --quick, with what the command line changes."""
    plan = PLANS["quick" if args.quick else args.device]
    asked = {name: getattr(args, name) for name in plan._fields if name in args}
    return plan._replace(**{name: value for name, value in asked.items() if value is not None})


def arms_of(workload: str, policies: tuple[str, ...], budgets: list[str]) -> tuple[Arm, ...]:
    """Stock, and every policy of the workload; budgets besides the first in "tight" only."""
    return STOCK, *(
        Arm(policy if budget == budgets[0] else f"{policy} {budget}", policy, budget)
        for budget in (budgets if workload == "tight" else budgets[:1])
        for policy in POLICIES_OF[workload]
        if policy in policies
    )


def measure(args: argparse.Namespace, plan: Plan) -> Iterator[tuple[Settings, list[Row]]]:
    def blocks(tokens: int) -> int:
        return -(-tokens // args.block_size)

    most = plan.prompt_tokens + plan.output_tokens
    most_long = plan.long_prompt_tokens + plan.long_output_tokens
    longest = max(most, most_long if "oversubscribed" in args.workloads else 0, *plan.single) + 64
    per_request = blocks(most)
    pools = {
        "tight": 3 * per_request + per_request // 2,
        "roomy": max(plan.roomy_for * per_request, blocks(longest) + 1),
        "oversubscribed": -(-plan.requests * blocks(most_long) // 3),
    }
    pools = {workload: pools[workload] for workload in args.workloads}
    arms = {workload: arms_of(workload, args.policies, args.budgets) for workload in pools}
    always = [workload for workload in pools if "always" in [arm.policy for arm in arms[workload]]]
    largest = max(pools.values())
    settings = Settings(
        model=args.model,
        method=args.method,
        budget=args.budgets[0],
        block_size=args.block_size,
        pool_blocks=largest,
        threads=args.threads,
        load_format="dummy" if args.dummy else "auto",
        max_model_len=min(longest, (largest - 1) * args.block_size),  # vLLM sets a block apart
        device=args.device,
        start="fast" if args.fast_start else "default",
    )
    print(f"starting two engines with a pool of {largest} blocks", flush=True)
    with Engines(settings) as engines:
        for workload, pool in pools.items():
            engines.limit_pool(pool)
            here = replace(settings, pool_blocks=pool)
            print(f"{workload}: {pool} blocks, {', '.join(arm.name for arm in arms[workload])}",
                  flush=True)  # fmt: skip
            if workload == "oversubscribed":
                lengths = (plan.long_prompt_tokens, plan.long_output_tokens)
                rounds = plan.rounds // 2
            else:
                lengths, rounds = (plan.prompt_tokens, plan.output_tokens), plan.rounds
            load = dict(zip(("prompt_tokens", "output_tokens"), lengths, strict=True))
            load["requests"] = plan.requests
            found = engines.repeat("burst", max(1, rounds), arms[workload], **load)
            yield here, as_rows(workload, found)
            for length in plan.single if workload in always[-1:] else ():
                if blocks(length + 64) >= pool:
                    continue
                one = {"requests": 1, "prompt_tokens": length, "output_tokens": 6}
                two = (STOCK, next(arm for arm in arms[workload] if arm.policy == "always"))
                found = engines.repeat("single", plan.pairs(length), two, **one)
                yield here, as_rows(f"single {length}", found)


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
    parser.add_argument("--workloads", nargs="+", choices=POLICIES_OF, default=list(POLICIES_OF),
                        help="the last one with a policy `always` does single, too")  # fmt: skip
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--method", default="bacon")
    parser.add_argument("--budgets", nargs="+", metavar="BUDGET",
                        help="default: 64 tokens on a CPU, 25%% on a GPU")  # fmt: skip
    parser.add_argument("--block-size", type=int, help="default: 32 on a CPU, 16 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; 1 disturbs least")
    parser.add_argument("--rounds", type=int, help="repetitions per arm; even")
    parser.add_argument("--requests", type=int, help="of tight and roomy")
    parser.add_argument("--prompt-tokens", type=int, help="of tight and roomy")
    parser.add_argument("--output-tokens", type=int, help="of tight and roomy")
    parser.add_argument("--single", type=int, nargs="*", help="prompt lengths of single")
    parser.add_argument("--fast-start", action="store_true",
                        help="on a GPU compile nothing: graphs of decode steps only")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny bursts: does it run at all?")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.budgets = args.budgets or ["25%" if on_gpu else "64"]
    args.block_size = args.block_size or (16 if on_gpu else 32)
    if args.dummy:
        from dummy_models import make

        args.model = str(make(args.dummy, ROOT / ".cache" / "dummy", shrunk=args.quick))
    args.model = args.model or str(ROOT / "examples" / "tiny-docvqa" / "model")
    return args


def medians(rows: list[Row]) -> dict[tuple[str, str, str], float]:
    """By workload, arm and quantity."""
    return {row[:3]: statistics.median(row.values) for row in rows}


def summary(rows: list[Row], pools: dict[str, int]) -> Iterator[str]:
    """The tables of the README, lines of Markdown; factors and percentages are medians over pairs.

    Args:
        rows: of the whole run.
        pools: blocks by workload.
    """
    found = medians(rows)
    yield "| pool | policy | | without | with | |"
    yield "|---|---|---|---|---|---|"
    for workload, arm in dict.fromkeys(row[:2] for row in rows):
        if arm == STOCK.name or "/" in arm or (workload, arm, "tokens_per_s") not in found:
            continue
        place = f"| {workload}, {pools[workload]} blocks | `{arm}`"
        for quantity, name in (
            ("tokens_per_s", "output tokens/s"),
            ("peak_running", "requests running at once"),
            ("preemptions", "preemptions"),
        ):
            stock, ours = (found[workload, a, quantity] for a in (STOCK.name, arm))
            ratio = found.get((workload, f"{arm} / stock", quantity))
            factor = f"x {ratio:.2f}" if ratio is not None else ""
            yield f"{place} | {name} | {stock:,.0f} | {ours:,.0f} | {factor} |"
            place = "| |"
        if (workload, arm) == MUST_EQUAL:
            equal = found[workload, arm, "equal_answers"]
            yield f"| | | answers equal to those without | | {equal:.0%} | |"
    yield ""
    columns = ("prompt tokens", "blocks held, without", "with", "first token, without",
               "with / without", "compression", "of prefill")  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|"
    for workload in dict.fromkeys(row.workload for row in rows):
        if not workload.startswith("single "):
            continue
        held = [found[workload, arm, "blocks_held"] for arm in ("stock", "always")]
        share = found[workload, "always", "compression_ms / stock first_token_ms"]
        yield (
            f"| {int(workload.split()[1]):,} | {held[0]:.0f} | {held[1]:.0f} "
            f"| {found[workload, 'stock', 'first_token_ms']:.1f} ms "
            f"| {found[workload, 'always / stock', 'first_token_ms']:.3f} "
            f"| {found[workload, 'always', 'compression_ms']:.1f} ms | {share:.1%} |"
        )


def headlines(rows: list[Row]) -> Iterator[str]:
    """A line for every arm of a workload: how it compares with stock."""
    found = medians(rows)
    for workload, pair, quantity in found:
        if quantity not in ("tokens_per_s", "first_token_ms") or " / stock" not in pair:
            continue
        arm = pair.removesuffix(" / stock")
        each = " and ".join(f"{found[workload, a, quantity]:.4g}" for a in (STOCK.name, arm))
        line = f"{workload}, {arm}: {quantity} x {found[workload, pair, quantity]:.3f} ({each})"
        for name in ("equal_answers", "preemptions", "compression_ms"):
            if (workload, arm, name) in found:
                line += f", {name} {found[workload, arm, name]:.3g}"
        yield line


def different_answers(rows: list[Row]) -> list[str]:
    """What must not be: a pool that is never short, and answers that are not those of stock."""
    return [
        f"{row.workload}, {row.arm}: only {min(row.values):.0%} of the answers equal those of stock"
        for row in rows
        if row[:3] == (*MUST_EQUAL, "equal_answers") and min(row.values) < 1
    ]


def main() -> None:
    args = parse()
    known = facts(args.device)
    file = args.out / f"{args.device}_{known['date']}.csv"
    args.out.mkdir(parents=True, exist_ok=True)
    every: list[Row] = []
    pools: dict[str, int] = {}
    writer = None
    with file.open("w", newline="", buffering=1) as sink:  # every row is on disk at once
        for settings, rows in measure(args, plan_of(args)):
            folder = Path(settings.model)
            model = folder.parent.name if folder.name == "model" else folder.name
            shared = known | asdict(settings) | {"model": model, "device": known["device"]}
            every += rows
            pools.setdefault(rows[0].workload, settings.pool_blocks)
            for row in rows:
                entry = shared | row._asdict() | percentiles(row.values)
                entry["samples"] = len(entry.pop("values"))
                if writer is None:
                    writer = csv.DictWriter(sink, entry, lineterminator="\n")
                    writer.writeheader()
                rounded = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in entry.items()}
                writer.writerow(rounded)
                print(
                    f"{row.workload:14} {row.arm:16} {row.quantity:38} "
                    f"{entry['p50']:9.4g} {row.unit:6} "
                    f"[{entry['p20']:.4g}, {entry['p80']:.4g}]",
                    flush=True,
                )
            for line in headlines(rows):
                print(f"== {line}", flush=True)
    print("", *summary(every, pools), "", sep="\n")
    print(f"{file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
    if problems := different_answers(every):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
