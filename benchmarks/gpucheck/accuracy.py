# SPDX-License-Identifier: Apache-2.0
"""Right answers of a small model, with and without compression.

    python -m gpucheck.accuracy --out FILE.csv --count 200 --methods bacon snapkv --budgets 64 96
    python -m gpucheck.accuracy --out FILE.csv --task needles --model DIR    # a chat model

``pages`` are those of examples/tiny-docvqa, whose model answers them all from the image;
``needles`` are numbers in some hundred tokens of other text. Engines run with graphs where there is
a GPU, in the type of the checkpoint. The run fails if stock vLLM answers less than nine in ten.
"""

import argparse
import csv
import functools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from serving import ROOT
from serving_engine import Engine, EngineProcess, Settings

EXAMPLE = ROOT / "examples" / "tiny-docvqa"
FEWEST = 0.9
OUTPUT_TOKENS = 8
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # of both models

WORDS = ("river", "stone", "window", "garden", "winter", "letter", "market", "road", "morning")
PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Quito", "Tunis", "Sofia", "Hanoi", "Accra")
SENTENCES = 55
"""Around a needle: some 600 tokens."""


class Question(NamedTuple):
    """A prompt as vLLM takes it, and what the answer must begin with."""

    prompt: dict[str, Any]
    answer: str


class Asked(Engine):
    """Answers questions; run as ``ask``."""

    max_images = 1

    def ask(self, prompts: list[dict[str, Any]]) -> list[str]:
        for prompt in prompts:
            self.add(prompt, OUTPUT_TOKENS)
        texts: dict[str, str] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                texts[output.request_id] = output.outputs[0].text
        return [texts[name] for name in sorted(texts)]  # as they were added


def pages(count: int) -> Iterator[Question]:
    sys.path.append(str(EXAMPLE))
    from pages import make_page

    for seed in range(count):
        page = make_page(seed)
        text = TURN.format(f"<|vision_start|><|image_pad|><|vision_end|>{page.question}")
        data = {"image": page.image}
        yield Question({"prompt": text, "multi_modal_data": data}, page.answer)


def needles(count: int) -> Iterator[Question]:
    for seed in range(count):
        rng = random.Random(seed)
        lines = [
            "The {} by the {} was quiet that {}.".format(*rng.sample(WORDS, 3))
            for _ in range(SENTENCES)
        ]
        place, number = rng.choice(PLACES), str(rng.randrange(1000, 10000))
        lines.insert(rng.randrange(SENTENCES), f"The secret number of {place} is {number}.")
        lines.append(f"What is the secret number of {place}? Answer with the number only.")
        yield Question({"prompt": TURN.format(" ".join(lines))}, number)


TASKS = {"pages": pages, "needles": needles}


def share(answers: list[str], questions: list[Question]) -> float:
    """Of the answers that are right."""
    pairs = zip(answers, questions, strict=True)
    return sum(q.answer in text for text, q in pairs) / len(questions)


def measure(args: argparse.Namespace, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """A row for stock vLLM, and for every method and budget."""
    on_gpu = args.device == "cuda"
    prompts = [question.prompt for question in questions]

    def settings(method: str) -> Settings:
        return Settings(
            model=str(args.model), method=method, budget=args.budgets[0],
            block_size=16 if on_gpu else 32, pool_blocks=2048 if on_gpu else 512, threads=1,
            load_format="auto", max_model_len=1024, device=args.device, start="fast",
        )  # fmt: skip

    for method in ("", *args.methods):
        arm = "always" if method else "stock"
        with EngineProcess(functools.partial(Asked, settings(method), arm), 1) as engine:
            for budget in args.budgets if method else ("",):
                if budget:
                    engine.run("configure", {"budget": budget})
                right = share(engine.run("ask", prompts), questions)
                yield {"method": method or arm, "budget": budget, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--task", choices=TASKS, default="pages")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=["bacon"])
    parser.add_argument("--budgets", nargs="+", default=["64"])
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    args = parser.parse_args()
    questions = list(TASKS[args.task](args.count))
    stock = 0.0
    with args.out.open("w", newline="", buffering=1) as sink:
        writer = csv.DictWriter(
            sink, ("task", "questions", "method", "budget", "right"), lineterminator="\n"
        )
        writer.writeheader()
        for row in measure(args, questions):
            writer.writerow({"task": args.task, "questions": len(questions)} | row)
            arm = f"{row['method']} {row['budget']}".strip()
            print(f"== {arm}: {row['right']:.1%} of {len(questions)} right", flush=True)
            stock = row["right"] if row["method"] == "stock" else stock
    if stock < FEWEST:
        sys.exit(f"stock vLLM answers only {stock:.0%}")


if __name__ == "__main__":
    main()
