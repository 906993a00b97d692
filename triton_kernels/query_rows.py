# SPDX-License-Identifier: Apache-2.0
"""Query rows that attention kernels gather, and their log-sum-exps, tile by tile of keys."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PromptPages


@triton.jit
def load_rows(
    q_ptr, i_row, o_row, o_head, m_row, num_rows, num_q_heads, HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries [rows, BLOCK_D] at any rows and query heads of one row; 0 where masked."""
    o_d = tl.arange(0, BLOCK_D)
    p_q = ((i_row * num_rows + o_row) * num_q_heads + o_head) * HEAD_SIZE
    mask = m_row[:, None] & (o_d < HEAD_SIZE)[None, :]
    return tl.load(q_ptr + p_q[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def add_tile(b_max, b_sum, b_z):
    """Maximum and sum of exponentials of rows, with one more tile of logits [rows, keys]."""
    new_max = tl.maximum(b_max, tl.max(b_z, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may have seen nothing yet
    b_sum = b_sum * tl.exp(b_max - shift) + tl.sum(tl.exp(b_z - shift[:, None]), 1)
    return new_max, b_sum


def arguments(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float,
    tile: dict[str, int],
) -> tuple[tuple[torch.Tensor | None, ...], tuple[float, ...], dict[str, int | bool]]:
    """What kernels over query rows take: tensors, numbers, and constants with those of a tile."""
    pages, block_table, num_kv_heads, layout = prompts[:4]
    _, num_rows, num_q_heads, head_size = queries.shape
    inputs = (
        queries.contiguous(),
        pages,
        block_table.contiguous(),
        prompt_lens.contiguous(),
        scale,
        prompts.key_scale,
    )
    numbers = (softcap, num_rows, num_q_heads, num_kv_heads, block_table.shape[1])
    sizes = tile | {
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_SOFTCAP": softcap != 0,
        "EXACT": queries.dtype == torch.float32,
        # products in float32 would spill registers
        "num_warps": 8 if queries.dtype == torch.float32 else 4,
    }
    return inputs, numbers, sizes
