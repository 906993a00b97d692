# SPDX-License-Identifier: Apache-2.0
"""Attention of single rows on a whole prompt, for scorers that look beyond the window."""

import torch

from vllm_kvcompress.kernels.reference import row_logits
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
    last_seen = ctx.prompt_lens[:, None] - 1 if query_pos is None else query_pos
    return row_logits(queries, ctx.keys, last_seen, ctx.scale, ctx.softcap).softmax(-1)
