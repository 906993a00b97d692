# SPDX-License-Identifier: Apache-2.0
"""Attention logits of the instruction: the text after the last visual token."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_kvcompress.kernels.reference import row_logits
from vllm_kvcompress.scoring.base import ScoringContext
from vllm_kvcompress.workspace import RowShape

_ROWS_AT_ONCE = 32
"""Bounds what one step holds: no more than an observation window would."""


class InstructionRows(NamedTuple):
    """Some rows of every prompt.

    Attributes:
        logits: [R, Hq, R, T] float32, scaled and capped, -inf at columns that a row does not see.
        positions: [R, R] int64; below 0 where a prompt is shorter.
        counts: [R, R] bool, whether the row belongs to the instruction; the logits of others are
            garbage, even NaN.
    """

    logits: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor


def instruction_elements(row: RowShape) -> int:
    """Float32 elements of the logits of one row that are looked at together."""
    return min(row.num_queries, _ROWS_AT_ONCE) * row.logits


def instruction_rows(ctx: ScoringContext) -> Iterator[InstructionRows]:
    """The last ``ctx.instruction_len`` rows of each prompt, a few at a time."""
    assert ctx.instruction_len is not None
    num_rows = ctx.queries.shape[1]
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, num_rows)
        row = torch.arange(start, stop, device=ctx.queries.device)
        positions = ctx.prompt_lens[:, None] - num_rows + row  # [R, R]
        counts = row >= num_rows - ctx.instruction_len[:, None]
        rows = ctx.queries[:, start:stop]
        logits = row_logits(rows, ctx.keys, positions, ctx.scale, ctx.softcap)
        yield InstructionRows(logits.flatten(1, 2), positions, counts)
