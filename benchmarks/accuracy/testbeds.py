# SPDX-License-Identifier: Apache-2.0
"""Models with the questions that they can answer when nothing is dropped."""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving import ROOT

from accuracy import clutter, smollm2, texts
from accuracy.asked import Settings

EXAMPLE = ROOT / "examples" / "tiny-docvqa" / "model"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


class Question(NamedTuple):
    """A question, or a text and how it goes on.

    Attributes:
        prompt: as vLLM takes it.
        answer: what the answer must contain; "" where nothing is asked.
        continuation: of a text where nothing is asked.
    """

    prompt: dict[str, Any]
    answer: str
    continuation: str = ""


@dataclass(frozen=True)
class Testbed:
    """A model and its tasks.

    Attributes:
        name: of the bed.
        model: folder of the checkpoint; made on the first call.
        settings: of the engine, but for the model.
        tasks: question number `seed` of each.
        budgets: to sweep over.
        output_tokens: most of them that an answer needs.
    """

    name: str
    model: Callable[[], str]
    settings: Settings
    tasks: dict[str, Callable[[int], Question]]
    budgets: tuple[str, ...]
    output_tokens: int


def page_question(seed: int, layout: clutter.Layout) -> Question:
    page = clutter.make(seed, layout)
    text = texts.TURN.format(PICTURE * layout.images + page.question)
    return Question({"prompt": text, "multi_modal_data": {"image": page.images}}, page.answer)


def text_question(seed: int, task: str, tokens: int) -> Question:
    question = texts.question(task, seed, essays(), tokens)
    return Question({"prompt": question.prompt}, question.answer, question.continuation)


@functools.cache
def essays() -> str:
    return smollm2.essays()


def pages_of(**layouts: clutter.Layout) -> dict[str, Callable[[int], Question]]:
    return {
        name.replace("_", " "): functools.partial(page_question, layout=layout)
        for name, layout in layouts.items()
    }


def texts_of(*tasks: tuple[str, int]) -> dict[str, Callable[[int], Question]]:
    return {
        f"{task} {tokens}": functools.partial(text_question, task=task, tokens=tokens)
        for task, tokens in tasks
    }


ROWS = Testbed(
    "rows",
    lambda: str(EXAMPLE),
    Settings("", max_images=1, max_model_len=1024, cache_mib=128),
    pages_of(
        rows=clutter.Layout("rows", digits=0.18),
        rows_digits=clutter.Layout("rows"),
        rows_digits_late=clutter.Layout("rows", late=True),
    ),
    ("49", "81", "113", "145"),
    5,
)
"""The example's model; its pages, and the same with more stray digits."""

TEXT = Testbed(
    "smollm2",
    lambda: str(smollm2.checkpoint()),
    Settings("", dtype="bfloat16", max_model_len=4608, cache_mib=768),
    texts_of(
        ("needle", 600), ("two needles", 600), ("filler", 600), ("common word", 600),
        ("needle", 2000), ("needle", 3600), ("text", 600),
    ),
    ("20%", "35%", "50%"),
    24,
)  # fmt: skip
"""SmolLM2-135M-Instruct."""

TESTBEDS = {bed.name: bed for bed in (ROWS, TEXT)}


def methods() -> dict[str, dict[str, Any]]:
    """What is swept: every preset at its own settings, controls, and parts taken away."""
    from vllm_kvcompress.presets import PRESETS

    # sparsemm has a file that is measured for each model
    found: dict[str, dict[str, Any]] = {
        name: {"method": name} for name in PRESETS if name != "sparsemm"
    }
    found |= {
        "keydiff+adakv": {"method": "keydiff+adakv"},
        "bacon+adakv": {"method": "bacon+adakv"},
        "mixkv+adakv": {"method": "mixkv+adakv"},
        "elastic without its merge": {"method": "elastic+uniform"},
        "h2o whole budget": {"method": "h2o+uniform"},
    }
    found["random"] = {"method": "random"}
    for kernel in (1, 3, 7, 9):
        found[f"snapkv kernel {kernel}"] = {"method": "snapkv", "kernel": kernel}
        found[f"bacon kernel {kernel}"] = {"method": "bacon", "kernel": kernel}
    for name in ("snapkv", "bacon"):
        found[f"{name} max pooling"] = {"method": name, "pool": "max"}
        for window in (8, 16):
            found[f"{name} window {window}"] = {"method": name, "window": window}
    # one query, the last: no mean to calibrate
    found["last query alone"] = {"method": "snapkv", "window": 1}
    for mode in ("e", "el", "rel"):
        found[f"bacon mode {mode}"] = {"method": "bacon", "mode": mode}
    found["bacon no trace"] = {"method": "bacon", "trace_r": 0}
    return found


def sample(names: list[str], seed: int) -> list[str]:
    """The methods in an order of their own for each batch, so that load meets all of them."""
    return random.Random(seed).sample(names, len(names))
