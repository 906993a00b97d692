# SPDX-License-Identifier: Apache-2.0
"""Random prompts with images, as batches that hold garbage wherever nobody may look."""

import dataclasses

import lcg
import numpy as np
import torch

from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import ScoringContext

WINDOW = 4


@dataclasses.dataclass
class Prompt:
    q: np.ndarray  # [Hq, P, D]
    k: np.ndarray  # [Hkv, P, D]
    images: list[tuple[int, int]]

    @classmethod
    def random(cls, seed, length, images, num_q=4, num_kv=2, head_size=8):
        rng = np.random.default_rng(seed)
        q, k = (rng.normal(size=(n, length, head_size)) * 1.5 for n in (num_q, num_kv))
        return cls(q.astype(np.float32), k.astype(np.float32), images)

    @property
    def length(self) -> int:
        return self.q.shape[1]

    @property
    def facts(self) -> PromptFacts:
        return PromptFacts(self.length, tuple(self.images))

    @property
    def segment(self) -> np.ndarray:
        segment = np.full(self.length, -1)
        for index, (start, end) in enumerate(self.images):
            segment[start:end] = index
        return segment


def batch_of(prompts: list[Prompt], garbage=float("nan"), **changes) -> ScoringContext:
    """Pages, rows that are not text and segments past a prompt's end hold garbage."""
    longest = max(prompt.length for prompt in prompts)
    instruction_len = [prompt.facts.num_instruction_tokens(WINDOW) for prompt in prompts]
    num_rows = max(WINDOW, *instruction_len)
    num_kv, _, head_size = prompts[0].k.shape
    keys = torch.full((len(prompts), num_kv, longest, head_size), garbage)
    queries = torch.full((len(prompts), num_rows, prompts[0].q.shape[0], head_size), garbage)
    segment = torch.full((len(prompts), longest), 0)
    for i, prompt in enumerate(prompts):
        keys[i, :, : prompt.length] = torch.from_numpy(prompt.k)
        rows = torch.from_numpy(prompt.q[:, -instruction_len[i] :]).transpose(0, 1)
        queries[i, num_rows - instruction_len[i] :] = rows
        segment[i, : prompt.length] = torch.from_numpy(prompt.segment)
    settings = {
        "layers": (0,),
        "stack": range(1),
        "prompt_lens": torch.tensor([prompt.length for prompt in prompts]),
        "capacity": torch.ones(len(prompts), dtype=torch.int64),
        "window": WINDOW,
        "queries": queries,
        "prompts": lcg.dense_prompts(keys, keys),
        "scale": torch.full((len(prompts),), head_size**-0.5),
        "instruction_len": torch.tensor(instruction_len),
        "segment": segment,
        "num_segments": max(len(prompt.images) for prompt in prompts),
    }
    return ScoringContext(**settings | changes)
