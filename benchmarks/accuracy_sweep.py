# SPDX-License-Identifier: Apache-2.0
"""Right answers of every method at every budget, through the plugin on vLLM's CPU engine.

    python benchmarks/accuracy_sweep.py --bed rows                        # all methods
    python benchmarks/accuracy_sweep.py --bed smollm2 --methods bacon mixkv keydiff+adakv
    python benchmarks/accuracy_sweep.py --bed rows --methods snapkv+adakv --options '{"kernel": 7}'
    python -m accuracy.report                                             # from benchmarks/: tables

All methods get the same questions, a batch at a time, so that a sweep which ends early has asked
all of them equally often. Every batch of a method and budget is written as soon as it is answered,
and not asked again by the next call: stop it when you like, and call it again for more. With
--likelihood the log-probability of the uncompressed model's answers under compression is taken as
well, and the divergence of the two predictions, token by token; it takes as long again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accuracy.asked import Asked, Sweeper, likelihood
from accuracy.testbeds import TESTBEDS, Question, Testbed, methods, sample
from gpucheck.machine import facts
from serving import ROOT

FOLDER = ROOT / ".cache" / "accuracy"
BATCH = 16
FORCED_TOKENS = 24
WHOLE = "uncompressed"


class Cell(NamedTuple):
    """What one row of results is about: a batch of questions under one setting."""

    task: str
    batch: int
    method: str
    budget: str


class Results:
    """Rows of one bed in a file; a row that is there is never measured again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text().splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
        self.done = {Cell(*(row[name] for name in Cell._fields)) for row in rows}

    def write(self, cell: Cell, **values: Any) -> None:
        with self._file.open("a") as sink:
            sink.write(json.dumps(cell._asdict() | values) + "\n")
        self.done.add(cell)


class Reference(NamedTuple):
    """A batch of one task, and what the uncompressed model makes of it.

    Attributes:
        forced: tokens of its answers, or of how the texts go on; empty without likelihoods.
        whole: log-probabilities [tokens, vocabulary] of each.
    """

    questions: list[Question]
    answers: list[Asked]
    forced: list[list[int]]
    whole: list[np.ndarray]


def refer(engine: Sweeper, bed: Testbed, task: str, batch: int, likelihood: bool) -> Reference:
    """Ask a batch without compression."""
    questions = [bed.tasks[task](batch * BATCH + number) for number in range(BATCH)]
    prompts = [question.prompt for question in questions]
    engine.use(None)
    answers, _ = engine.ask(prompts, bed.output_tokens)
    if not likelihood:
        return Reference(questions, answers, [], [])
    forced = [
        engine.tokenizer.encode(question.continuation, add_special_tokens=False)[:FORCED_TOKENS]
        if question.continuation
        else answer.token_ids
        for question, answer in zip(questions, answers, strict=True)
    ]
    _, whole = engine.ask(prompts, 1, forced)
    return Reference(questions, answers, forced, whole)


def setting(
    engine: Sweeper, bed: Testbed, task: Reference, method: dict, budget: str
) -> dict | None:
    """A method's settings with a budget that means the same number of tokens for all of them.

    Where only visual tokens compete, text is kept on top: the budget is lowered by as much.

    Returns:
        None where nothing would be dropped, or too little is left for visual tokens.
    """
    from vllm_kvcompress.config import Candidates, KVCompressionConfig

    config = KVCompressionConfig.parse(method | {"budget": "50%"})
    if config.candidates is not Candidates.VISUAL:
        possible = budget.endswith("%") or int(budget) > config.window
        return method | {"budget": budget} if possible else None
    if not bed.settings.max_images:
        return None
    text = max(len(engine.tokenizer.encode(q.prompt["prompt"])) for q in task.questions)
    left = int(budget) - text
    return method | {"budget": left} if left >= 8 else None


def run(engine: Sweeper, bed: Testbed, args: argparse.Namespace, known: dict) -> Iterator[None]:
    """Write the missing rows, batch by batch; yields after each cell, measured or not."""
    results = Results(args.out)
    names = sample(list(known), 0)
    for batch in range(args.first_batch, args.first_batch + args.batches):
        for task in args.tasks:
            cells = [Cell(task, batch, name, b) for name in names for b in args.budgets]
            own = Cell(task, batch, WHOLE, "")
            if results.done.issuperset([own, *cells]):
                yield from (None for _ in cells)
                continue
            reference = refer(engine, bed, task, batch, args.likelihood)
            if own not in results.done:
                results.write(own, **row(reference, reference.answers, reference.whole))
            for cell in cells:
                if cell not in results.done:
                    chosen = setting(engine, bed, reference, known[cell.method], cell.budget)
                    results.write(cell, **measure(engine, bed, reference, chosen))
                yield


def measure(engine: Sweeper, bed: Testbed, task: Reference, chosen: dict | None) -> dict[str, Any]:
    """One cell; empty where the method cannot keep so little."""
    if chosen is None:
        return {}
    start = time.process_time()
    engine.use(chosen)
    prompts = [question.prompt for question in task.questions]
    answers, seen = engine.ask(prompts, bed.output_tokens, task.forced)
    return row(task, answers, seen) | {"cpu_seconds": round(time.process_time() - start, 2)}


def row(task: Reference, answers: list[Asked], seen: list[np.ndarray]) -> dict[str, Any]:
    """The columns of one cell; lists have one entry per question."""
    found = [
        likelihood(tokens, ours, whole)
        for tokens, ours, whole in zip(task.forced, seen, task.whole, strict=True)
    ]
    pairs = list(zip(task.questions, answers, strict=True))
    return {
        "kept": round(answers[0].kept, 2),
        "right": [q.answer in a.text if q.answer else None for q, a in pairs],
        "answers": [answer.text for answer in answers],
        **({"logprob": [round(entry.logprob, 4) for entry in found]} if found else {}),
        **({"divergence": [round(entry.divergence, 5) for entry in found]} if found else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bed", choices=TESTBEDS, required=True)
    parser.add_argument("--tasks", nargs="+", help="default: all of the bed")
    parser.add_argument("--methods", nargs="+", help="names of the sweep, or any method string")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for all --methods")
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--likelihood", action="store_true", help="of the full cache's answers")
    parser.add_argument("--batches", type=int, default=16, help=f"of {BATCH} questions each")
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--dtype", help="default: the bed's")
    parser.add_argument("--out", type=Path, help="JSON lines; default: .cache/accuracy/BED.jsonl")
    args = parser.parse_args()
    from tqdm import tqdm

    bed = TESTBEDS[args.bed]
    args.tasks, args.budgets = args.tasks or list(bed.tasks), args.budgets or bed.budgets
    args.out = args.out or FOLDER / f"{bed.name}.jsonl"
    if unknown := set(args.tasks) - bed.tasks.keys():
        sys.exit(f"{bed.name} has no tasks {sorted(unknown)}; it has {', '.join(bed.tasks)}")
    every = methods()
    known = {name: every.get(name, {"method": name}) for name in args.methods or every}
    if args.options:
        label = " ".join(f"{key}={value}" for key, value in args.options.items())
        known = {f"{name} {label}": chosen | args.options for name, chosen in known.items()}
    settings = bed.settings._replace(model=bed.model())
    settings = settings._replace(dtype=args.dtype or settings.dtype)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    versions = args.out.with_suffix(".facts.json")
    about = facts("cpu") | {"bed": bed.name, "dtype": settings.dtype}
    if versions.exists() and (old := json.loads(versions.read_text())["dtype"]) != settings.dtype:
        sys.exit(f"{args.out} was measured in {old}: choose another --out")
    versions.write_text(json.dumps(about, indent=1) + "\n")
    engine = Sweeper(settings)
    total = len(known) * len(args.budgets) * len(args.tasks) * args.batches
    for _ in tqdm(run(engine, bed, args, known), total=total, unit="cell", file=sys.stderr):
        pass


if __name__ == "__main__":
    main()
