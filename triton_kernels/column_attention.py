# SPDX-License-Identifier: Apache-2.0
"""Attention that each key receives: QK^T twice, or once where log-sum-exps are known.

Nothing of size C x T is stored. The second pass gives every tile of keys to one program, which
walks over the rows that see it: no atomics, so the sums are the same in every run.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows
from vllm_kvcompress.kernels.reference import PromptPages

_KEYS_PER_TILE = 64


@triton.jit
def _row_lse_kernel(
    q_ptr,  # [M, C, Hq, D]
    lengths_ptr,  # [M] int64
    positions_ptr,  # [M] int64
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [M, B] int64
    scale_ptr,  # [M] float32
    key_scale_ptr,  # [M] float32, or None
    lse_ptr,  # [M, Hq, C] float32
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    width,  # C
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Log-sum-exp of one tile of rows over the keys that they see."""
    i_row = tl.program_id(0).to(tl.int64) // num_q_heads
    i_qhead = tl.program_id(0) % num_q_heads
    i_head = i_qhead // (num_q_heads // num_kv_heads)
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    length = tl.load(lengths_ptr + i_row).to(tl.int32)
    end = tl.load(positions_ptr + i_row).to(tl.int32) + length  # position after the last row
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (o_c >= width - length) & (o_c < width)
    row_position = end - width + o_c
    b_q = query_rows.load_rows(
        q_ptr, i_row, o_c, i_qhead, m_c, width, num_q_heads, HEAD_SIZE, BLOCK_D
    )
    b_max = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    num_seen = tl.max(tl.where(m_c, row_position + 1, 0), 0)
    for start in range(0, num_seen, BLOCK_T):
        o_key = start + tl.arange(0, BLOCK_T)
        b_k = paged_keys.load_keys(
            pages_ptr, table_ptr, i_row, i_head, o_key, o_key < num_seen, num_kv_heads, num_blocks,
            HEAD_SIZE, PAGE_TOKENS, BLOCK_D,
        )  # fmt: skip
        b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
        b_z = tl.where(o_key[None, :] <= row_position[:, None], b_z, float("-inf"))
        b_max, b_sum = query_rows.add_tile(b_max, b_sum, b_z)
    b_lse = b_max + tl.log(tl.where(m_c, b_sum, 1.0))
    tl.store(lse_ptr + (i_row * num_q_heads + i_qhead) * width + o_c, b_lse, mask=m_c)


@triton.jit
def _key_attention_sum_kernel(
    q_ptr,  # [M, C, Hq, D]
    lengths_ptr,  # [M] int64
    positions_ptr,  # [M] int64
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [M, B] int64
    scale_ptr,  # [M] float32
    key_scale_ptr,  # [M] float32, or None
    lse_ptr,  # [M, Hq, C] float32
    total_ptr,  # [M, Hkv, B * block_size] float32
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    width,  # C
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Probabilities of one tile of keys, summed over rows, mean over query heads."""
    i_row = tl.program_id(0).to(tl.int64) // num_kv_heads
    i_head = tl.program_id(0) % num_kv_heads
    group = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    length = tl.load(lengths_ptr + i_row).to(tl.int32)
    end = tl.load(positions_ptr + i_row).to(tl.int32) + length
    first_key = tl.program_id(1) * BLOCK_T
    o_key = first_key + tl.arange(0, BLOCK_T)
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, o_key < end, num_kv_heads, num_blocks,
        HEAD_SIZE, PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    b_sum = tl.zeros((BLOCK_T,), tl.float32)
    # earlier rows see none of these keys
    first_row = width - tl.minimum(length, end - first_key)
    for g in range(group):
        i_qhead = i_head * group + g
        p_lse = lse_ptr + (i_row * num_q_heads + i_qhead) * width
        for start in range(first_row, width, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            m_c = o_c < width
            b_q = query_rows.load_rows(
                q_ptr, i_row, o_c, i_qhead, m_c, width, num_q_heads, HEAD_SIZE, BLOCK_D
            )
            b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
            sees = (o_key[None, :] <= (end - width + o_c)[:, None]) & m_c[:, None]
            b_lse = tl.load(p_lse + o_c, mask=m_c, other=0.0)
            b_sum += tl.sum(tl.exp(tl.where(sees, b_z, float("-inf")) - b_lse[:, None]), 0)
    length_out = num_blocks * PAGE_TOKENS
    offset = (i_row * num_kv_heads + i_head) * length_out + o_key
    tl.store(total_ptr + offset, b_sum / group, mask=o_key < length_out)


def key_attention_sum(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    prompts: PromptPages,
    scale: torch.Tensor,
    softcap: float = 0.0,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """See ``reference.key_attention_sum``; keys are read through the block table.

    Args:
        queries: [M, C, Hq, D], right-aligned.
        prompts: with token-row pages.
        lse: [M, Hq, C] float32, contiguous, log-sum-exp of each row's logits where an attention
            kernel left it; saves the first pass.

    Returns:
        [M, Hkv, B * block_size] float32.
    """
    pages, block_table, num_kv_heads, layout = prompts[:4]
    num, width, num_q_heads, head_size = queries.shape
    num_blocks = block_table.shape[1]
    inputs = (
        queries.contiguous(),
        lengths.contiguous(),
        positions.contiguous(),
        pages,
        block_table.contiguous(),
        scale,
        prompts.key_scale,
    )
    exact = queries.dtype == torch.float32  # small tiles, whose products do not spill registers
    rows_per_tile = 16 if exact else 64
    numbers = (softcap, num_q_heads, num_kv_heads, num_blocks, width)
    sizes = {
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_C": rows_per_tile,
        "BLOCK_T": _KEYS_PER_TILE,
        "HAS_SOFTCAP": softcap != 0,
        "EXACT": exact,
        "num_warps": 8,
    }
    if lse is None:
        lse = queries.new_empty((num, num_q_heads, width), dtype=torch.float32)
        grid = (num * num_q_heads, triton.cdiv(width, rows_per_tile))
        _row_lse_kernel[grid](*inputs, lse, *numbers, **sizes)
    length = num_blocks * layout.block_size
    total = queries.new_empty((num, num_kv_heads, length), dtype=torch.float32)
    grid = (num * num_kv_heads, triton.cdiv(length, _KEYS_PER_TILE))
    _key_attention_sum_kernel[grid](*inputs, lse, total, *numbers, **sizes)
    return total
