# SPDX-License-Identifier: Apache-2.0
"""Answers of a sweep against an independent run of the same questions in Transformers.

    python benchmarks/accuracy_agreement.py --bed rows --methods bacon snapkv --budgets 81

Nothing is shared with the plugin: scores and kept sets come from the oracle of the tests (numpy,
float64), the model is Transformers' in float32, and evicted tokens are masked, never moved. Sweep
first, in float32, or else answers differ by rounding. Written to benchmarks/results.
"""

import argparse
import copy
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accuracy.testbeds import TESTBEDS, Question, Testbed, methods
from accuracy_sweep import FOLDER
from serving import ROOT
from tqdm import tqdm

sys.path.append(str(ROOT / "tests"))
from oracle import Oracle, OracleConfig
from oracle_settings import oracle_settings

from vllm_kvcompress.config import KVCompressionConfig

BLOCK_SIZE = 32


class Independent(Oracle):
    """Computes the prefill of a question once for all settings."""

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoTokenizer

        super().__init__(model_dir)
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._asked: tuple[list[int], Any] = ([], None)

    def _prefill(self, inputs: Any) -> Any:
        ids = inputs["input_ids"][0].tolist()
        if ids != self._asked[0]:
            self._asked = (ids, super()._prefill(inputs))
        self._evicted = None
        result, prompt = self._asked[1]
        return copy.deepcopy(result), prompt  # decoding appends to its cache

    def answer(self, question: Question, config: OracleConfig | None, tokens: int) -> str:
        """Greedy, up to the end of the answer."""
        images = question.prompt.get("multi_modal_data", {}).get("image")
        ids = self._expanded(self.tokenizer.encode(question.prompt["prompt"]), images or [])
        found = self.generate(ids, tokens, config, images).token_ids
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        stop = next((n for n, token in enumerate(found) if token in ends), len(found))
        return self.tokenizer.decode(found[:stop])

    def _expanded(self, ids: Sequence[int], images: Sequence[Any]) -> list[int]:
        """One placeholder for each visual token."""
        pad = getattr(self.model.config, "image_token_id", None)
        left, expanded = iter(images), []
        for token in ids:
            side = 28
            image = next(left) if token == pad else None
            count = 1 if image is None else (image.width // side) * (image.height // side)
            expanded += [token] * count
        return expanded


def agreement(bed: Testbed, rows: Sequence[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """One row per task, method and budget of a sweep's first questions.

    Args:
        rows: of the sweep, those to repeat.
        count: questions of each, at most.
    """
    oracle, known = Independent(bed.model()), methods()
    asked: dict[tuple[str, int], list[tuple[dict[str, Any], str]]] = {}
    for row in rows:
        first = row["batch"] * len(row["answers"])
        for number, text in enumerate(row["answers"], first):
            if number < count:
                asked.setdefault((row["task"], number), []).append((row, text))
    totals: dict[tuple[str, str, str], list[tuple[bool, bool, bool]]] = {}
    for (task, number), given in tqdm(asked.items(), unit="question"):
        question = bed.tasks[task](number)
        for row, ours in given:
            chosen = known.get(row["method"], {"method": row["method"]})
            config = None
            if row["budget"]:
                settings = KVCompressionConfig.parse(chosen | {"budget": row["budget"]})
                config = oracle_settings(settings, BLOCK_SIZE)
            theirs = oracle.answer(question, config, bed.output_tokens)
            same = theirs == ours, question.answer in ours, question.answer in theirs
            totals.setdefault((task, row["method"], row["budget"]), []).append(same)
    for (task, method, budget), found in totals.items():
        same, ours, theirs = (sum(column) for column in zip(*found, strict=True))
        yield {
            "bed": bed.name, "task": task, "method": method, "budget": budget, "n": len(found),
            "same answers": same, "right": ours, "right in Transformers": theirs,
            "right in one only": sum(a != b for _, a, b in found),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bed", choices=TESTBEDS, default="rows")
    parser.add_argument("--tasks", nargs="+", help="default: all that were swept")
    parser.add_argument("--methods", nargs="+", default=["bacon", "snapkv", "mixkv"])
    parser.add_argument("--budgets", nargs="+", default=["81"])
    parser.add_argument("--count", type=int, default=64, help="questions of each cell")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    bed = TESTBEDS[args.bed]
    lines = (FOLDER / f"{bed.name}.jsonl").read_text().splitlines()
    chosen = [
        row
        for row in map(json.loads, lines)
        if "answers" in row
        and (not args.tasks or row["task"] in args.tasks)
        and (not row["budget"] or (row["method"] in args.methods and row["budget"] in args.budgets))
    ]
    file = args.out / f"accuracy_agreement_{bed.name}.csv"
    found = list(agreement(bed, chosen, args.count))
    with file.open("w", newline="") as sink:
        writer = csv.DictWriter(sink, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for row in found:
        print(*row.values(), sep=", ")


if __name__ == "__main__":
    main()
