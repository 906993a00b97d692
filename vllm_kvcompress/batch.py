# SPDX-License-Identifier: Apache-2.0
"""How one step's tokens are cut up: host-side planning in numpy, no vLLM, no device.

A request brings the tokens of positions [C, C + q). Those of a compressed request attend to its
head pages, those of any other one to its uncompressed cache: a step never straddles the position at
which a request is compressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_kvcompress.plan import PromptPlan
from vllm_kvcompress.scoring import Need


@dataclass(frozen=True)
class StepBatch:
    """The R requests of a step, in batch order; every array is [R].

    Attributes:
        req_ids: vLLM's ids.
        slots: int64, state slots; nobody's for requests that have not been compressed.
        compressed: bool, whether the request has been compressed.
        plans: of prompts that are going to be compressed, else None.
        num_computed: int64, C.
        query_lens: int64, q.
        query_starts: int64, index of the first token in the batch.
    """

    req_ids: Sequence[str]
    slots: np.ndarray
    compressed: np.ndarray
    plans: Sequence[PromptPlan | None]
    num_computed: np.ndarray
    query_lens: np.ndarray
    query_starts: np.ndarray

    def chunks(self) -> "list[PromptChunk]":
        """Parts of prompts that are going to be compressed, as far as a method looks at them."""
        found = []
        starts, lens = self.num_computed.tolist(), self.query_lens.tolist()
        for i, plan in enumerate(self.plans):
            if plan is None:
                continue
            end = starts[i] + lens[i]
            if plan.looks_at(starts[i], end):
                end = min(end, plan.facts.length)
                found.append(PromptChunk(i, int(self.query_starts[i]), starts[i], end, plan))
        return found


class PromptChunk(NamedTuple):
    """Tokens of one prompt in a step.

    Attributes:
        owner: index of the request in the batch.
        token: index of the first one in the batch.
        start, end: their positions.
        plan: of the prompt.
    """

    owner: int
    token: int
    start: int
    end: int
    plan: PromptPlan


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated aranges: [start, start + length) of every entry."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def head_major_order(starts: np.ndarray, lengths: np.ndarray, num_heads: int) -> np.ndarray:
    """Order of a per-head batch's queries.

    Token t and KV head h of the batch stand at t * num_heads + h; a sequence of one KV head wants
    all its tokens together. Returns the source index of each of the lengths.sum() * num_heads.
    """
    tokens = np.repeat(lengths, num_heads)  # tokens of each sequence
    heads = np.tile(np.arange(num_heads), len(lengths))
    first = np.repeat(starts, num_heads) * num_heads + heads
    steps = ranges(np.zeros_like(tokens), tokens)
    return np.repeat(first, tokens) + steps * num_heads


class QueryRun(NamedTuple):
    """Consecutive queries of one prompt that scorers will look at.

    Attributes:
        owner: index of the request in the batch.
        token: index of the first one in the batch.
        length: of the run, at least 1.
        distance: of the last one's position from the prompt's last one.
    """

    owner: int
    token: int
    length: int
    distance: int


def query_runs(chunks: Sequence[PromptChunk]) -> list[QueryRun]:
    """Which queries have to be kept until their prompt is compressed."""
    found = []
    for owner, token, start, end, plan in chunks:
        length = plan.facts.length
        low = max(start, length - plan.num_rows)
        if low < end:
            found.append(QueryRun(owner, token + low - start, end - low, length - end))
    return found


class ChunkStats(NamedTuple):
    """Prompt tokens of this step that statistics over prompts take in; [M] int64 arrays.

    Attributes:
        owner: index of the request in the batch.
        starts, lengths: first batch token, and number of tokens.
        positions: position of the first token.
        counted: how many of the last tokens count in moments.
    """

    owner: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    counted: np.ndarray


def by_statistics(chunks: Sequence[PromptChunk]) -> dict[Need, list[PromptChunk]]:
    """Chunks by what is summed over their prompts; those without any sum are left out."""
    found: dict[Need, list[PromptChunk]] = {}
    for chunk in chunks:
        needs = chunk.plan.config.needs.statistics
        if needs:
            found.setdefault(needs, []).append(chunk)
    return found


def plan_stats(chunks: Sequence[PromptChunk]) -> list[ChunkStats]:
    """The tokens of the chunks, in groups.

    Chunks of a group are less than twice as long as each other, so that padding them to the longest
    takes less than twice as much memory as their tokens.
    """
    groups: dict[int, list[tuple[int, ...]]] = {}
    for owner, token, start, end, plan in chunks:
        counted = end - min(max(plan.moments_from, start), end)
        row = (owner, token, end - start, start, counted)
        groups.setdefault((end - start).bit_length(), []).append(row)
    return [ChunkStats(*np.array(rows, dtype=np.int64).T) for rows in groups.values()]
