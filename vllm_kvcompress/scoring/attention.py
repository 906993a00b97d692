# SPDX-License-Identifier: Apache-2.0
"""Attention of single rows on a whole prompt, for scorers that look beyond the window."""

import torch

from vllm_kvcompress.scoring.base import LayerContext


def attention(
    ctx: LayerContext, queries: torch.Tensor, query_pos: torch.Tensor | None = None
) -> torch.Tensor:
    """Probabilities of M rows on all keys that they see, 0 elsewhere.

    Holds N * Hq * M * T float32: callers pass as few rows at a time as they can afford.

    Args:
        queries: [N, M, Hq, D], after norm and RoPE.
        query_pos: [N, M] int64, positions of the rows in the prompt; None if they see all of it.
            A row at a negative position sees nothing and comes back as NaN.

    Returns:
        [N, Hkv, G, M, T] float32.
    """
    num, rows, num_q_heads, head_size = queries.shape
    num_kv_heads = ctx.keys.shape[1]
    group = num_q_heads // num_kv_heads
    grouped = (queries.float() * ctx.scale).view(num, rows, num_kv_heads, group, head_size)
    grouped = grouped.permute(0, 2, 3, 1, 4).reshape(num, num_kv_heads, group * rows, head_size)
    logits = torch.matmul(grouped, ctx.keys.transpose(2, 3))
    if ctx.softcap:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    logits = logits.view(num, num_kv_heads, group, rows, -1)
    last_seen = ctx.prompt_lens[:, None] - 1 if query_pos is None else query_pos
    hidden = ctx.positions > last_seen[:, :, None]  # [N, M or 1, T]
    return logits.masked_fill_(hidden[:, None, None], float("-inf")).softmax(-1)
