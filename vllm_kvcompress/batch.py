# SPDX-License-Identifier: Apache-2.0
"""How one step's tokens are cut up: host-side planning in numpy, no vLLM, no device.

A request brings the tokens of positions [C, C + q). Those of a compressed request attend to its
head pages, those of any other one to its uncompressed cache: a step never straddles the position at
which a request is compressed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_kvcompress.plan import PromptPlan


@dataclass(frozen=True)
class StepBatch:
    """The R requests of a step, in batch order; every array is [R].

    Attributes:
        req_ids: vLLM's ids.
        slots: int64, state slots.
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

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """[R] int64, tokens of prompts that are going to be compressed."""
        lens = [0 if plan is None else plan.facts.length for plan in self.plans]
        return np.clip(np.array(lens, dtype=np.int64) - self.num_computed, 0, self.query_lens)

    @cached_property
    def bring_rows(self) -> np.ndarray:
        """[R] bool, whether a method looks at some of the request's tokens."""
        end = self.num_computed + self.prompt_tokens
        first = [0 if plan is None else plan.first_row for plan in self.plans]
        return (self.prompt_tokens > 0) & (end > np.array(first, dtype=np.int64))


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


@dataclass(frozen=True)
class QueryGather:
    """Queries of this step that scorers will look at; arrays are int64, of equal length.

    Attributes:
        owner: index of the request in the batch.
        distance: of the position from the prompt's last one.
        token: index in the batch.
    """

    owner: np.ndarray
    distance: np.ndarray
    token: np.ndarray


def gather_queries(batch: StepBatch) -> QueryGather:
    """Which queries have to be kept until their prompt is compressed."""
    chosen = np.flatnonzero(batch.bring_rows)
    plans = [batch.plans[i] for i in chosen]
    lens = np.array([plan.facts.length for plan in plans if plan], dtype=np.int64)
    wanted = np.array([plan.num_rows for plan in plans if plan], dtype=np.int64)
    start = batch.num_computed[chosen]
    low = np.maximum(start, lens - wanted)
    count = np.maximum(start + batch.prompt_tokens[chosen] - low, 0)
    position = ranges(low, count)
    return QueryGather(
        owner=np.repeat(chosen, count),
        distance=np.repeat(lens, count) - 1 - position,
        token=np.repeat(batch.query_starts[chosen] - start, count) + position,
    )


@dataclass(frozen=True)
class ChunkStats:
    """Prompt tokens of this step that statistics over prompts take in; arrays are int64.

    Attributes:
        owner: [M] index of the request in the batch.
        starts, lengths: [M] first batch token, and number of tokens.
        positions: [M] position of the first token.
        skip: [M] first tokens of each that do not count in moments.
    """

    owner: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    skip: np.ndarray


def plan_stats(batch: StepBatch) -> ChunkStats:
    """The chunks of prompts that are going to be compressed, and whose tokens count."""
    chosen = np.flatnonzero(batch.bring_rows)
    first = np.array([plan.moments_from for i in chosen if (plan := batch.plans[i])], np.int64)
    lengths, positions = batch.prompt_tokens[chosen], batch.num_computed[chosen]
    return ChunkStats(
        owner=chosen,
        starts=batch.query_starts[chosen],
        lengths=lengths,
        positions=positions,
        skip=np.clip(first - positions, 0, lengths),
    )
