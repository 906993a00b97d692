# SPDX-License-Identifier: Apache-2.0
"""All model families that people serve: compressed by a small budget, stock vLLM with a large one.

Text and rotary embeddings of all kinds, images as visual tokens in between; tiny random weights.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
from engine import (
    BLOCK_SIZE,
    Answer,
    Method,
    Stepper,
    assert_clean,
    assert_same,
    differ,
    engine,
    free_blocks,
    generate,
    held_blocks,
    random_prompt,
)
from oracle import OracleConfig, page_plan
from PIL import Image
from tiny_models import TOKENIZER
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

METHODS = {"bacon": 96, "aircache": 24, "shiftkv": 96}
"""Budget of each method in tokens; aircache's is of visual tokens."""
TEXT_ONLY = ("llama", "mistral")
IMAGE_TOKEN = "<|image_pad|>"
OUTPUT_TOKENS = 8
PROMPTS = ("long", "short", "other image")

by_family = pytest.mark.parametrize("family", tiny_families.FAMILIES)
by_method = pytest.mark.parametrize("method", METHODS)


@functools.cache
def checkpoint(family: str) -> str:
    cache = Path(__file__).resolve().parents[2] / ".cache" / "models"
    return str(tiny_families.make(family, cache))


def noise(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A picture in which no two visual tokens are alike; width and height in pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompts(family: str) -> list[dict[str, Any]]:
    """One prompt per entry of PROMPTS; the last is the first with another image, or other text."""

    def prompt(seed: int, length: int, *size: int) -> dict[str, Any]:
        if family in TEXT_ONLY:
            return {"prompt": text_of(random_prompt(length + 200, seed))}
        image = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
        text = text_of(random_prompt(length, seed=1))
        return {"prompt": image + text, "multi_modal_data": {"image": noise(seed, *size)}}

    return [prompt(1, 300), prompt(2, 20, 56, 56), prompt(3, 300)]


def text_of(token_ids: list[int]) -> str:
    """Tokens of printable characters as text."""
    return TOKENIZER.decode(token_ids)


def image_runs(token_ids: list[int]) -> list[tuple[int, int]]:
    """Runs [start, end) of image tokens."""
    image = TOKENIZER.token_to_id(IMAGE_TOKEN)
    edges = np.diff([0, *(token == image for token in token_ids), 0])
    return list(zip(*(np.flatnonzero(edges == sign).tolist() for sign in (1, -1)), strict=True))


def open_engine(family: str, method: Method | None = None):
    images = {} if family in TEXT_ONLY else {"limit_mm_per_prompt": {"image": 1, "video": 0}}
    return engine(checkpoint(family), method, **images)


@functools.cache
def stock(family: str) -> list[Answer]:
    """What vLLM answers without compression."""
    with open_engine(family) as llm:
        return generate(llm, prompts(family))


@by_family
def test_stock_equals_transformers(family):
    """vLLM and Transformers read the same model from the files, and the image matters."""
    folder = checkpoint(family)
    text_only = family in TEXT_ONLY
    model_class = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    processor = (AutoTokenizer if text_only else AutoProcessor).from_pretrained(folder)
    for prompt, answer in zip(prompts(family), stock(family), strict=True):
        images = {} if text_only else {"images": [prompt["multi_modal_data"]["image"]]}
        inputs = processor(text=[prompt["prompt"]], return_tensors="pt", **images)
        output = model.generate(**inputs, max_new_tokens=OUTPUT_TOKENS, do_sample=False)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == answer.token_ids
    assert differ(stock(family)[:1], stock(family)[2:])


@by_family
def test_covering_budget_is_stock(family):
    with open_engine(family, Method("bacon", "100%")) as llm:
        free = free_blocks(llm)
        assert_same(generate(llm, prompts(family)), stock(family))
        Stepper(llm).flush()
        assert_clean(llm, free)


@by_family
@by_method
def test_compressed(family, method):
    """Blocks go back one step after the prompt, as many as the budget says; every token comes."""
    budget = METHODS[method]
    with open_engine(family, Method(method, budget)) as llm:
        free = free_blocks(llm)
        stepper = Stepper(llm)
        for name, prompt in zip(PROMPTS, prompts(family), strict=True):
            stepper.add(name, prompt)
        held: dict[str, list[int]] = {name: [] for name in PROMPTS}
        while stepper.engine.has_unfinished_requests():
            stepper.step()
            for name, prompt_ids in stepper.prompts.items():
                if stepper.num_computed(name) >= len(prompt_ids):
                    held[name].append(held_blocks(stepper, name))
        stepper.run()
        assert_clean(llm, free)

    compressed = 0
    for name, expected in zip(PROMPTS, stock(family), strict=True):
        answer = stepper.done[name]
        prompt_ids = stepper.prompts[name]
        plan = page_plan(
            len(prompt_ids),
            OracleConfig(budget, scorer=method, block_size=BLOCK_SIZE),
            segments=image_runs(prompt_ids),
        )
        assert len(answer.token_ids) == OUTPUT_TOKENS
        # the first token comes from the whole prompt
        assert answer.token_ids[0] == expected.token_ids[0]
        if not plan.compressed:
            assert_same([answer], [expected])
            continue
        compressed += 1
        before, after = held[name][:2]
        assert before >= plan.full
        assert before > after == plan.uniform + 1
        assert differ([answer], [expected])
    without_images = method == "aircache" and family in TEXT_ONLY
    assert compressed == 0 if without_images else compressed >= 2
