# SPDX-License-Identifier: Apache-2.0
"""Drafts that a test chooses, and what became of them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from vllm import LLM


class Drafts(NamedTuple):
    """Draft tokens of the engine that was started last, as vLLM counts them."""

    proposed: int
    accepted: int


def acceptance(llm: LLM) -> Drafts:
    values = {metric.name: metric for metric in llm.get_metrics()}
    names = ("num_draft_tokens", "num_accepted_tokens")
    return Drafts(*(int(values[f"vllm:spec_decode_{name}"].value) for name in names))


class Guesser:
    """Continues known texts, with every third token spoilt, and others by nonsense.

    Args:
        known: prompts with their answers.
        seed: of what is spoilt.
    """

    def __init__(self, known: Sequence[Sequence[int]], seed: int) -> None:
        self.known = [list(text) for text in known]
        self.rng = random.Random(seed)

    def guess(self, text: list[int], count: int) -> list[int]:
        after = next((t[len(text) :] for t in self.known if t[: len(text)] == text), [])
        tokens = (after + [0] * count)[:count]
        return [t if self.rng.random() > 1 / 3 else (t + 1) % 94 for t in tokens]

    def for_runner_v1(self):
        """In place of ``NgramProposer.propose``: none to all of the drafts that are asked for."""

        def propose(proposer, most, sampled_token_ids, num_tokens, token_ids, slot_mappings=None):
            drafts = []
            for row, sampled in enumerate(sampled_token_ids):
                text = token_ids[row, : num_tokens[row]].tolist()
                room = proposer.max_model_len - len(text) - 1
                count = min(self.rng.randrange(most + 1), room) if sampled else 0
                drafts.append(self.guess(text, max(count, 0)))
            return drafts

        return propose

    def for_runner_v2(self):
        """In place of ``NgramGPUSpeculator.propose``, which Triton's interpreter refuses."""

        def propose(speculator, input_batch, *args, dummy_run=False, **kwargs):
            states, count = speculator.req_states, speculator.num_speculative_steps
            if not dummy_run:
                for row, index in enumerate(input_batch.idx_mapping.tolist()):
                    length = int(states.total_len.gpu[index])
                    text = states.all_token_ids.gpu[index, :length].tolist()
                    speculator.drafts[row] = torch.tensor(self.guess(text, count))
            return speculator.drafts[: input_batch.num_reqs]

        return propose
