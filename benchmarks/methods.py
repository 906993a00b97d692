# SPDX-License-Identifier: Apache-2.0
"""What each method costs per request, and how well its budget fills pages.

    python benchmarks/methods.py                              # every scorer, allocator and merge
    python benchmarks/methods.py --quick --methods bacon,h2o  # 2,000 tokens only, 4 rounds, no file

Engines of one thread each, real ones: a stock engine lives all along and prefills the same prompts
in turns with the engine of each method. Half of a prompt are visual tokens, of two images, so that
methods for those have something to do; both engines have encoded the images before, which keeps the
vision tower out of both times.

    keeping_ms          while the prompt is prefilled: last queries, and sums over the prompt
    compression_ms      before the step after it: scoring, allocation, merging and compaction
    cost_ms             both
    stock prefill_ms    the step that prefills it without compression
    blocks_held         of the pool, once the prompt is compressed and its first tokens are decoded
    blocks_ideal        the same if the tokens that the method was asked to keep filled every head
                        page to the last slot

Allocators and merges need a scorer; subtract the row of that scorer with ``uniform``. Results: a
table, and one CSV row per quantity, method and length with hardware, versions, percentiles and the
machine's load.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from gpucheck.machine import facts
from serving import ROOT, percentiles
from serving_engine import Burst, Engine, EngineProcess, Settings, random_prompts, time_calls

LENGTHS = (500, 1000, 2000)
PATCH = 28
"""Pixels per side of one visual token of the model."""
IMAGE_WIDTH = 25
"""Visual tokens per row of an image; heights follow from the prompt length."""
INSTRUCTION = 40
"""Text tokens after the last image, the window of 32 among them."""

SCORER_OF = {
    "aircache": "aircache",
    "prefixkv": "prefixkv",
    "vlcache": "postvision",
    "elastic": "elastic",
}
"""Allocators and merges that are made for one scorer; the others run with snapkv."""


class Case(NamedTuple):
    """A method to measure: the part of it that is of interest, and the whole string."""

    kind: str
    name: str
    method: str


class VisualEngine(Engine):
    """Serves prompts with images, and knows how many pages they would ideally hold."""

    max_images = 2

    def __init__(self, settings: Settings, arm: str, **options: Any) -> None:
        super().__init__(settings, arm, **options)
        if self.compresses:
            from vllm_kvcompress.adapter.backend import CompressedImpl

            self.keeping_seconds = time_calls(CompressedImpl, "_keep")

    def prompts(self, burst: Burst) -> list[dict[str, Any]]:
        ids = self.engine.get_tokenizer().convert_tokens_to_ids
        image_ids = [ids(f"<|{name}|>") for name in ("vision_start", "image_pad", "vision_end")]
        images = [noise(seed, burst.prompt_tokens // 4) for seed in range(2)]
        num_text = burst.prompt_tokens - burst.prompt_tokens // 2 - 4  # 4 markers of images
        result = []
        for text in random_prompts(burst):
            cut = num_text - INSTRUCTION
            tokens = text[:cut] + image_ids + image_ids + text[cut:num_text]
            data = {"image": images}
            result.append({"prompt_token_ids": tokens, "multi_modal_data": data})
        return result

    def compression_ms(self) -> dict[str, float]:
        return super().compression_ms() | {"keeping_ms": 1000 * self.keeping_seconds()}

    def pages(self, request: str) -> dict[str, float]:
        """Blocks that a running request would hold if every head page were full.

        What is behind the prompt's full blocks is kept as it is in any case, a page per head and
        layer for every block_size tokens.
        """
        from vllm_kvcompress.allocation import StaticAllocator

        compressed = self.scheduler.compression.manager.compressed
        tracked, planner = compressed.tracked[request], compressed.planner
        plan = tracked.plan
        assert tracked.compressed, "the prompt fits the budget: nothing is measured"
        size, owners = planner.block_size, planner.num_layers * planner.num_kv_heads
        scored = plan.capacity * owners
        if isinstance(planner.config.allocation, StaticAllocator):
            scored = sum(map(sum, planner.head_budgets(plan)))
        in_pages = scored + (plan.num_protected - plan.tail) * owners
        behind = tracked.request.num_computed_tokens - plan.num_full_blocks * size
        return {
            "blocks_ideal": math.ceil(in_pages / size) / owners + math.ceil(behind / size),
        }


def noise(seed: int, num_tokens: int) -> Any:
    """An image of so many visual tokens."""
    from PIL import Image

    assert num_tokens % IMAGE_WIDTH == 0, f"{num_tokens} tokens are no rows of {IMAGE_WIDTH}"
    width, height = IMAGE_WIDTH * PATCH, num_tokens // IMAGE_WIDTH * PATCH
    pixels = random.Random(seed).randbytes(3 * width * height)
    return Image.frombytes("RGB", (width, height), pixels)


def cases() -> Iterator[Case]:
    """One of every scorer, allocator and merge of the tables."""
    from vllm_kvcompress.allocation import ALLOCATORS
    from vllm_kvcompress.merging import MERGES
    from vllm_kvcompress.scoring import SCORERS

    for name in SCORERS:
        yield Case("scorer", name, f"{name}+uniform")
    for name in ALLOCATORS:
        yield Case("allocator", name, f"{SCORER_OF.get(name, 'snapkv')}+{name}")
    for name in MERGES:
        yield Case("merge", name, f"{SCORER_OF.get(name, 'snapkv')}+uniform+{name}")


def write_head_scores(model: str, path: Path) -> None:
    """Random head scores for sparsemm, a few heads far above the rest."""
    config = json.loads((Path(model) / "config.json").read_text())
    text = config.get("text_config", config)
    rng = random.Random(0)
    heads = [
        f"{layer}-{head}"
        for layer in range(text["num_hidden_layers"])
        for head in range(text["num_attention_heads"])
    ]
    path.write_text(json.dumps({head: [rng.paretovariate(1.5)] for head in heads}))


Values = dict[str, list[float]]


def measure(engine: EngineProcess, stock: EngineProcess, length: int, rounds: int) -> Values:
    """Both engines in turns, every round with its own text; one value per round and quantity."""
    values: Values = {}
    for number in range(-1, rounds):  # the first one warms up
        burst = Burst(requests=1, prompt_tokens=length, output_tokens=4, seed=number)
        arms = [stock, engine] if number % 2 else [engine, stock]
        by_arm = {arm: arm.run("single", burst) for arm in arms}
        plain, ours = by_arm[stock], by_arm[engine]
        cost, prefill = ours["keeping_ms"] + ours["compression_ms"], plain["first_token_ms"]
        found = {
            "keeping_ms": ours["keeping_ms"],
            "compression_ms": ours["compression_ms"],
            "cost_ms": cost,
            "stock prefill_ms": prefill,
            "cost_ms / stock prefill_ms": cost / prefill,
            "stock blocks_held": plain["blocks_held"],
            "blocks_held": ours["blocks_held"],
            "blocks_ideal": ours["blocks_ideal"],
            "blocks_held / blocks_ideal": ours["blocks_held"] / ours["blocks_ideal"],
        }
        for quantity, value in found.items() if number >= 0 else ():
            values.setdefault(quantity, []).append(value)
    return values


def measure_all(
    args: argparse.Namespace, lengths: tuple[int, ...], rounds: int
) -> Iterator[tuple[Case, Settings, int, Values]]:
    """Every chosen method at every length."""
    pool_blocks = 4 * -(-max(LENGTHS) // args.block_size)

    def settings(method: str) -> Settings:
        return Settings(
            model=args.model,
            method=method,
            budget=args.budget,
            block_size=args.block_size,
            pool_blocks=pool_blocks,
            threads=args.threads,
            load_format="auto",
            max_model_len=2048,
            device="cpu",
        )

    with tempfile.TemporaryDirectory() as folder:
        head_scores = Path(folder) / "head_scores.json"
        write_head_scores(args.model, head_scores)
        make_stock = functools.partial(VisualEngine, settings(""), "stock")
        with EngineProcess(make_stock, args.threads) as stock:
            for case in cases():
                if args.methods and case.name not in args.methods:
                    continue
                ours = settings(case.method)
                options = {"head_scores": str(head_scores)} if case.name == "sparsemm" else {}
                make = functools.partial(VisualEngine, ours, "always", **options)
                with EngineProcess(make, args.threads) as engine:
                    for length in lengths:
                        yield case, ours, length, measure(engine, stock, length, rounds)


def unit(quantity: str) -> str:
    if "/" in quantity:
        return "ratio"
    return "ms" if quantity.endswith("_ms") else "blocks"


def entries(
    shared: dict[str, Any], case: Case, length: int, values: Values
) -> Iterator[dict[str, Any]]:
    """CSV rows of one measurement."""
    place = {"kind": case.kind, "name": case.name, "prompt_tokens": length}
    load = {"load_average": f"{os.getloadavg()[0]:.1f}"}
    for quantity, samples in values.items():
        numbers = {name: f"{value:.4g}" for name, value in percentiles(samples).items()}
        what = {"quantity": quantity, "unit": unit(quantity), "samples": len(samples)}
        yield shared | place | what | numbers | load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "examples" / "tiny-docvqa" / "model"))
    parser.add_argument("--budget", default="128")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of each engine; 1 disturbs least")
    parser.add_argument("--rounds", type=int, default=10, help="repetitions per length; even")
    parser.add_argument(
        "--methods",
        type=lambda names: names.split(","),
        metavar="NAME,NAME",
        help="some of the scorers, allocators and merges",
    )
    parser.add_argument("--quick", action="store_true", help="one length, 4 rounds, no file")
    results = ROOT / "benchmarks" / "results" / "methods_cpu.csv"
    parser.add_argument("--out", type=Path, default=results)
    args = parser.parse_args()
    names = {case.name for case in cases()}
    if unknown := set(args.methods or ()) - names:
        parser.error(f"--methods: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    known = facts("cpu")
    print("keeping rows, scoring, allocation, merging and compaction of one prompt, medians:")
    heads = ("tokens", "keep ms", "ms", "of prefill", "blocks", "ideal")
    print(f"{'method':28}", *(f"{head:>10}" for head in heads))
    with contextlib.ExitStack() as stack:
        writer = None
        lengths, rounds = (LENGTHS[-1:], 4) if args.quick else (LENGTHS, args.rounds)
        for case, settings, length, values in measure_all(args, lengths, rounds):
            shared = known | asdict(settings) | {"model": Path(settings.model).parent.name}
            found = list(entries(shared, case, length, values))
            if not args.quick:
                if writer is None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    sink = stack.enter_context(args.out.open("w", newline="", buffering=1))
                    writer = csv.DictWriter(sink, found[0], lineterminator="\n")
                    writer.writeheader()
                writer.writerows(found)
            median = {name: percentiles(samples)["p50"] for name, samples in values.items()}
            numbers = (
                f"{length}",
                f"{median['keeping_ms']:.1f}",
                f"{median['compression_ms']:.1f}",
                f"{median['cost_ms / stock prefill_ms']:.1%}",
                f"{median['blocks_held']:.0f}",
                f"{median['blocks_ideal']:.2f}",
            )
            print(f"{case.method:28}", *(f"{number:>10}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()
