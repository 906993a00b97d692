# SPDX-License-Identifier: Apache-2.0
"""How far log-probabilities of two correct implementations lie apart on this machine.

Every processor sums in its own order, so the number is no constant: it is measured in the run, on
what has nothing to do with compression, stock vLLM against Transformers.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny_models
from engine import as_prompt, engine, random_prompt
from oracle import Oracle
from vllm import SamplingParams

MARGIN = 4
"""Answers of other contexts than the measured ones: noise is a maximum over few draws."""

CEILING = 2e-4
"""No tolerance is above it: one token too few in one head of one layer moves more (tested)."""

OUTPUT_TOKENS = 8
TOP_LOGPROBS = 5
"""Of each step: where a model is sure, the noise of the chosen token's logit cancels out."""


def measured_tolerance(model: str, prompts: Sequence[Any], **settings: Any) -> float:
    """MARGIN times the largest difference between stock vLLM's and Transformers' answers.

    Args:
        model: folder of a checkpoint, run in float32.
        prompts: as ``generate`` takes them.
        settings: of the engine.
    """
    params = SamplingParams(
        max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True, logprobs=TOP_LOGPROBS
    )
    with engine(model, **settings) as llm:
        outputs = llm.generate([as_prompt(prompt) for prompt in prompts], params, use_tqdm=False)
    transformers = Oracle(model)
    differences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        images = prompt.get("multi_modal_data", {}).get("image") if type(prompt) is dict else None
        expected = transformers.generate(output.prompt_token_ids, OUTPUT_TOKENS, None, images)
        if list(output.outputs[0].token_ids) != expected.token_ids:
            raise RuntimeError(f"{model}: stock vLLM and Transformers write different tokens")
        for ours, theirs in zip(output.outputs[0].logprobs, expected.top5, strict=True):
            differences += [abs(ours[t].logprob - theirs[t]) for t in theirs if t in ours]
    return min(MARGIN * max(differences), CEILING)


@functools.cache
def text_tolerance() -> float:
    """For the tiny llamas on random text."""
    folder = Path(__file__).resolve().parents[2] / ".cache" / "models"
    model = str(tiny_models.make("llama", folder))
    return measured_tolerance(model, [random_prompt(n, seed=2) for n in (400, 70, 257, 320, 129)])
