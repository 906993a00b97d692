# SPDX-License-Identifier: Apache-2.0
"""The small deterministic model behind the published worked examples of the scoring methods.

L = 3 layers, Hq = 4, Hkv = 2, T = 12 positions, D = 4, window W = 3, so n = 9 scored positions.
"""

import functools
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.scoring import LayerTrace, ScoringContext
from vllm_kvcompress.testing.inputs import dense_prompts

LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, LENGTH, HEAD_SIZE, WINDOW = 3, 4, 2, 12, 4, 3
NUM_SCORED = LENGTH - WINDOW
SCALE = HEAD_SIZE**-0.5
SEGMENT = (-1, -1, 0, 0, 0, 1, 1, 1, -1, -1, -1, -1)
"""Two images of three tokens between a system text and an instruction."""
TEXT_ROWS = 4
VISUAL = tuple(t for t, image in enumerate(SEGMENT) if image >= 0)


def published(text: str) -> list[float]:
    """Numbers as they stand in a publication."""
    return [float(word) for word in text.split()]


@functools.cache
def queries_keys_values() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [L, Hq, T, D], k and v [L, Hkv, T, D]: draws of a linear congruential generator."""
    state = 7

    def draw(*shape: int) -> np.ndarray:
        nonlocal state
        values = np.empty(shape)
        for index in np.ndindex(*shape):
            state = (1103515245 * state + 12345) % 2**31
            values[index] = state / 2**31 * 4 - 2
        return values

    return (
        draw(LAYERS, NUM_Q_HEADS, LENGTH, HEAD_SIZE),
        draw(LAYERS, NUM_KV_HEADS, LENGTH, HEAD_SIZE),
        draw(LAYERS, NUM_KV_HEADS, LENGTH, HEAD_SIZE),
    )


def layer_context(layer: int, capacity: int, trace: LayerTrace, **facts: Any) -> ScoringContext:
    """One layer of the model as a batch of one request; ``facts`` are further fields."""
    q, k, v = (torch.from_numpy(x[layer]).float() for x in queries_keys_values())
    facts = {
        "num_recent": torch.tensor([WINDOW]),
        "instruction_len": torch.tensor([TEXT_ROWS]),
        "segment": torch.tensor([SEGMENT]),
        "num_segments": 2,
        **facts,
    }
    return ScoringContext(
        layers=(layer,),
        stack=range(layer, layer + 1),
        prompt_lens=torch.tensor([LENGTH]),
        capacity=torch.tensor([capacity]),
        window=WINDOW,
        queries=q.transpose(0, 1)[None],
        prompts=dense_prompts(k[None], v[None]),
        scale=torch.tensor([SCALE]),
        trace=trace,
        **facts,
    )
