# SPDX-License-Identifier: Apache-2.0
"""How one step's rows are cut up: host-side planning in numpy, no vLLM, no device.

A row is one request's tokens of this step: positions [C, C + q) of a prompt of P tokens.

    prompt part   [C, min(P, C + q))   natural attention over the uncompressed prompt
    decode part   [max(P, C), C + q)   virtual attention over head pages

Usually a row has one part. It has both when the outputs of a preempted request are replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_kvcompress.plan import PromptPlan


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, in batch order; every array is [R] int64.

    Attributes:
        req_ids: request of each row.
        slots: state slot of each request.
        fresh: [R] bool, the slot was handed out in this step.
        prompt_lens: P.
        num_computed: C, positions computed before this step.
        query_lens: q, tokens in this step.
        query_starts: index of the first token in the batch.
        plans: one per row.
    """

    req_ids: Sequence[str]
    slots: np.ndarray
    fresh: np.ndarray
    prompt_lens: np.ndarray
    num_computed: np.ndarray
    query_lens: np.ndarray
    query_starts: np.ndarray
    plans: Sequence[PromptPlan]

    @cached_property
    def prompt_part(self) -> np.ndarray:
        """Tokens of each row that belong to the prompt."""
        return np.clip(self.prompt_lens - self.num_computed, 0, self.query_lens)

    @cached_property
    def decode_part(self) -> np.ndarray:
        return self.query_lens - self.prompt_part

    @cached_property
    def ends_prompt(self) -> np.ndarray:
        """[R] bool: the prompt's last token is in this step."""
        part = self.prompt_part
        return (part > 0) & (self.num_computed + part == self.prompt_lens)

    @cached_property
    def compresses(self) -> np.ndarray:
        return np.fromiter((plan.compresses for plan in self.plans), bool, len(self.plans))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated aranges: [start, start + length) of every entry."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def head_major_order(starts: np.ndarray, lengths: np.ndarray, num_heads: int) -> np.ndarray:
    """Row order of a virtual batch's queries.

    Token t and KV head h of the batch stand at t * num_heads + h; a virtual sequence wants all
    tokens of one (row, head) together. Returns the source index of each of the lengths.sum() *
    num_heads.
    """
    tokens = np.repeat(lengths, num_heads)  # tokens of each virtual sequence
    heads = np.tile(np.arange(num_heads), len(lengths))
    first = np.repeat(starts, num_heads) * num_heads + heads
    steps = ranges(np.zeros_like(tokens), tokens)
    return np.repeat(first, tokens) + steps * num_heads


@dataclass(frozen=True)
class RowPlan:
    """Where the last query rows of prompts come from and go to in this step; arrays are int64.

    The last rows of a prompt, whose queries the methods look at, usually lie in the chunk that ends
    it. When they straddle chunks, the earlier ones put their queries into a per-request store.

    Attributes:
        tokens: [N, Q] batch token of the last Q rows of the N ending prompts (0 where stored or not
            asked for).
        load: (row of N, row of Q, request row of this step, store row) of queries from the store.
        save: (request row of this step, store row, batch token) of queries that go to the store.
            Store rows count from the prompt's end.
    """

    tokens: np.ndarray
    load: tuple[np.ndarray, ...]
    save: tuple[np.ndarray, ...]


def plan_rows(rows: StepRows, ending: np.ndarray) -> RowPlan:
    """Plan the query rows of the rows ``ending`` [N] and of those that stop inside theirs."""
    wanted = np.fromiter((plan.num_rows for plan in rows.plans), np.int64, len(rows.plans))
    first = rows.prompt_lens - wanted  # position of the first row that is looked at
    start, part = rows.num_computed, rows.prompt_part

    width = int(wanted[ending].max(initial=0))
    back = np.arange(width, 0, -1)  # distance from the prompt's end
    position = rows.prompt_lens[ending, None] - back  # [N, Q]
    asked = position >= first[ending, None]
    here = position >= start[ending, None]
    token = rows.query_starts[ending, None] + position - start[ending, None]
    entry, column = np.nonzero(asked & ~here)

    partial = np.flatnonzero(
        rows.compresses & ~rows.ends_prompt & (start + part > first) & (part > 0)
    )
    low = np.maximum(start, first)[partial]
    length = (start + part)[partial] - low
    saved = ranges(low, length)
    owner = np.repeat(partial, length)
    return RowPlan(
        tokens=np.where(asked & here, token, 0),
        load=(entry, column, ending[entry], back[column] - 1),
        save=(
            owner,
            rows.prompt_lens[owner] - saved - 1,
            rows.query_starts[owner] + saved - start[owner],
        ),
    )


@dataclass(frozen=True)
class SumPlan:
    """The prompt rows of this step that sums over the prompt take in; arrays are int64.

    Attributes:
        rows: [M] rows of the step with prompt tokens of a compressing request.
        starts, lengths: [M] their first batch token and number of tokens.
        positions: [M] position of the first token.
        skip: [M] first tokens of each that do not count in moments.
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray
    skip: np.ndarray


def plan_sums(rows: StepRows) -> SumPlan:
    chosen = np.flatnonzero((rows.prompt_part > 0) & rows.compresses)
    first = np.array([rows.plans[i].moments_from for i in chosen], dtype=np.int64)
    lengths, positions = rows.prompt_part[chosen], rows.num_computed[chosen]
    return SumPlan(
        rows=chosen,
        starts=rows.query_starts[chosen],
        lengths=lengths,
        positions=positions,
        skip=np.clip(first - positions, 0, lengths),
    )
