# SPDX-License-Identifier: Apache-2.0
"""One engine for many settings: its requests, and how it is told to use other methods."""

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families
from engine import (
    Answer,
    Method,
    Stepper,
    compressed_layers,
    engine,
    greedy,
    held_blocks,
    model_runner,
    random_prompt,
    replan,
)
from head_pages import HeldPages, held_pages
from PIL import Image
from tiny_models import TOKENIZER

from vllm_kvcompress.adapter import output_weights
from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.merging import MERGES
from vllm_kvcompress.scoring import SCORERS

BLOCK_SIZE = 32  # vLLM's CPU attention has no smaller ones
WINDOW = 8
OUTPUT_TOKENS = 3
LAYERS, QUERY_HEADS = 3, 4
PIXELS_PER_TOKEN = 28  # side of the patch that becomes one visual token

Raw = dict[str, Any]
"""Settings as `KVCompressionConfig.parse` takes them."""


@functools.cache
def checkpoint() -> str:
    cache = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return str(tiny_families.make("qwen2-vl", cache, layers=LAYERS))


# methods

BUDGET, VISUAL_BUDGET = 80, 40
PARTNERS = {
    "aircache": "aircache",
    "prefixkv": "prefixkv",
    "vlcache": "postvision",
    "elastic": "elastic",
}
"""Scorers for allocators and merges that do not go with snapkv, or were published with another."""
METHODS = (
    *SCORERS,
    *(f"{PARTNERS.get(name, 'snapkv')}+{name}" for name in ALLOCATORS if name != "uniform"),
    *(f"{PARTNERS.get(name, 'snapkv')}+uniform+{name}" for name in MERGES),
)
"""Every scorer, allocator and merge."""


def settings(method: str, **options) -> Raw:
    """Settings for a method "scorer+allocator+merge"; sparsemm wants its file as well."""
    budget = VISUAL_BUDGET if SCORERS[method.split("+")[0]].visual_only else BUDGET
    return {"method": method, "budget": budget, "window": WINDOW, **options}


def write_head_scores(folder: Path) -> str:
    """A file of head scores for sparsemm, no two heads alike."""
    heads = itertools.product(range(LAYERS), range(QUERY_HEADS))
    file = folder / "heads.json"
    file.write_text(
        json.dumps({f"{row}-{head}": [1 + 9 * row * head, head] for row, head in heads})
    )
    return str(file)


# requests


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt for both sides: text with placeholders, and its images."""

    text: str
    images: tuple[Image.Image, ...] = ()

    @property
    def prompt(self) -> dict[str, Any]:
        images = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.text, **images}


def picture(seed: int, rows: int, columns: int) -> Image.Image:
    """Noise that becomes rows x columns visual tokens, no two alike."""
    size = (rows * PIXELS_PER_TOKEN, columns * PIXELS_PER_TOKEN, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return Image.fromarray(pixels)


def characters(count: int, seed: int) -> str:
    return TOKENIZER.decode(random_prompt(count, seed))


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@functools.cache
def mixed_requests() -> tuple[Request, ...]:
    """238, 161, 192 and 60 tokens; the last one is below every budget in tokens."""
    text = functools.partial(characters, seed=5)
    return (
        Request(
            text(12) + IMAGE + text(9) + IMAGE + text(33), (picture(1, 10, 9), picture(2, 9, 10))
        ),
        Request(IMAGE + text(51), (picture(3, 12, 9),)),
        Request(text(192)),
        Request(text(60)),
    )


@functools.cache
def long_request() -> Request:
    """1000 tokens, one image among them."""
    return Request(characters(400, 6) + IMAGE + characters(418, 7), (picture(4, 12, 15),))


# engine


@contextmanager
def open_engine(chunk: int) -> Iterator[Any]:
    """One engine whose steps take at most `chunk` tokens, to be reconfigured from test to test.

    It starts with a method that looks at attention inputs: hooks for them are set at the start.
    """
    with engine(
        checkpoint(),
        Method("shiftkv", 80, WINDOW),
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=chunk,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2, "video": 0},
    ) as llm:
        yield llm


def reconfigure(llm, raw: Raw) -> None:
    """Make an idle engine of this process compress by other settings.

    An engine takes its settings at its start and hands them to its worker and to the manager of
    the compressed blocks. Both are changed here, and the prefix cache is emptied, so that no prompt
    begins with blocks that another method has left.
    """
    config = KVCompressionConfig.parse(raw)
    layers = compressed_layers(llm)
    # read at the start of an engine whose method needs them
    output_weights.install(model_runner(llm).get_model(), layers.facts.modules, config)
    layers.configure(replace(layers.planner, config=config))
    replan(llm, config)


@dataclass(frozen=True)
class Served:
    """What an engine made of one request.

    Attributes:
        held: head pages of the prompt when it has been compressed.
        kept_blocks: blocks that the full blocks of the prompt still hold afterwards.
    """

    answer: Answer
    held: HeldPages
    kept_blocks: int


def of_prompt(held: HeldPages, length: int) -> HeldPages:
    """Without what was decoded behind a prompt of ``length`` tokens."""
    keys, values = (
        [[rows[: len(rows) + length - held.num_computed] for rows in heads] for heads in part]
        for part in (held.keys, held.values)
    )
    pages = [
        [ids[: -(-len(rows) // BLOCK_SIZE)] for ids, rows in zip(*layer, strict=True)]
        for layer in zip(held.page_ids, keys, strict=True)
    ]
    return HeldPages(keys, values, pages, length)


def serve(llm, requests: Sequence[Request]) -> list[Served]:
    """Run requests as one batch."""
    stepper = Stepper(llm)
    names = [str(index) for index in range(len(requests))]
    for name, request in zip(names, requests, strict=True):
        stepper.add(name, request.prompt, greedy(OUTPUT_TOKENS))
    held, blocks = {}, {}
    while stepper.engine.has_unfinished_requests():
        stepper.step()
        for name, ids in stepper.prompts.items():
            computed = stepper.num_computed(name)
            # compressed at the beginning of the step after the prompt
            if computed > len(ids) and name not in held:
                held[name] = of_prompt(held_pages(stepper, name), len(ids))
                behind = computed - len(ids) // BLOCK_SIZE * BLOCK_SIZE
                blocks[name] = held_blocks(stepper, name) - -(-behind // BLOCK_SIZE)
    stepper.run()
    return [Served(stepper.done[name], held[name], blocks[name]) for name in names]
