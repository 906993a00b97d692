# SPDX-License-Identifier: Apache-2.0
"""Attention logits of the instruction: the text after the last visual token."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_kvcompress.scoring.base import LayerContext

_ROWS_AT_ONCE = 32
"""Bounds what one step holds: no more than an observation window would."""


class InstructionRows(NamedTuple):
    """Some rows of every prompt.

    Attributes:
        logits: [N, Hq, R, T] float32, scaled and capped, -inf at columns that a row does not see.
        positions: [N, R] int64; below 0 where a prompt is shorter.
        counts: [N, R] bool, whether the row belongs to the instruction; the logits of others are
            garbage, even NaN.
    """

    logits: torch.Tensor
    positions: torch.Tensor
    counts: torch.Tensor


def instruction_rows(ctx: LayerContext, last_only: bool = False) -> Iterator[InstructionRows]:
    """The last ``ctx.text_rows`` rows of each prompt, a few at a time, or just the very last."""
    assert ctx.text_rows is not None
    num, num_rows, num_q_heads, head_size = ctx.queries.shape
    num_kv_heads, length = ctx.keys.shape[1:3]
    group = num_q_heads // num_kv_heads
    for start in range(num_rows - 1 if last_only else 0, num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, num_rows)
        row = torch.arange(start, stop, device=ctx.queries.device)
        positions = ctx.prompt_lens[:, None] - num_rows + row  # [N, R]
        counts = row >= num_rows - ctx.text_rows[:, None]
        rows = ctx.queries[:, start:stop].float() * ctx.scale
        rows = rows.unflatten(2, (num_kv_heads, group))
        rows = rows.permute(0, 2, 3, 1, 4).reshape(num, num_kv_heads, -1, head_size)
        logits = torch.matmul(rows, ctx.keys.transpose(2, 3))
        if ctx.softcap:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        logits = logits.view(num, num_q_heads, stop - start, length)
        hidden = ctx.positions > positions[..., None]
        yield InstructionRows(
            logits.masked_fill_(hidden[:, None], float("-inf")), positions, counts
        )
