# SPDX-License-Identifier: Apache-2.0
"""Keys that rows of an instruction look at almost as much as at their favourite: QK^T twice.

Nothing of size I x T is stored. A program takes some rows of all query heads of a KV head.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows
from vllm_kvcompress.kernels.reference import PromptPages
from vllm_kvcompress.kernels.reference_rows import log_share


@triton.jit
def _tile_logits(
    b_q, pages_ptr, table_ptr, i_row, i_head, start, end, last_seen, scale, softcap, num_kv_heads,
    num_blocks, HEAD_SIZE: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Logits [rows, keys] of the keys from ``start`` on, and which of them a row sees."""
    o_key = start + tl.arange(0, BLOCK_T)
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, o_key < end, num_kv_heads, num_blocks,
        HEAD_SIZE, PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
    return b_z, o_key[None, :] <= last_seen[:, None]


@triton.jit(do_not_specialize=["num_blocks"])
def _strong_keys_kernel(
    q_ptr,  # [R, Q, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    instruction_len_ptr,  # [R] int64
    counts_ptr,  # [R, Hq, Q] int32
    softcap,
    num_rows,  # Q
    num_q_heads,
    num_kv_heads,
    num_blocks,
    least,  # log of the threshold
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) // num_kv_heads
    i_head = tl.program_id(0) % num_kv_heads
    group = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    instruction_len = tl.load(instruction_len_ptr + i_row).to(tl.int32)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_row, o_qhead = o_r // group, i_head * group + o_r % group
    inside = o_row < num_rows
    m_r = inside & (o_row >= num_rows - instruction_len)
    last_seen = prompt_len - num_rows + o_row
    end = tl.max(tl.where(m_r, last_seen + 1, 0), 0)
    b_q = query_rows.load_rows(
        q_ptr, i_row, o_row, o_qhead, m_r, num_rows, num_q_heads, HEAD_SIZE, BLOCK_D
    )
    b_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for start in range(0, end, BLOCK_T):
        b_z, sees = _tile_logits(
            b_q, pages_ptr, table_ptr, i_row, i_head, start, end, last_seen, scale, softcap,
            num_kv_heads, num_blocks, HEAD_SIZE, PAGE_TOKENS, BLOCK_D, BLOCK_T, HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        b_max = tl.maximum(b_max, tl.max(tl.where(sees, b_z, float("-inf")), 1))
    b_least = b_max + least
    b_count = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, end, BLOCK_T):
        b_z, sees = _tile_logits(
            b_q, pages_ptr, table_ptr, i_row, i_head, start, end, last_seen, scale, softcap,
            num_kv_heads, num_blocks, HEAD_SIZE, PAGE_TOKENS, BLOCK_D, BLOCK_T, HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        b_count += tl.sum((sees & (b_z >= b_least[:, None])).to(tl.int32), 1)
    p_counts = counts_ptr + (i_row * num_q_heads + o_qhead) * num_rows + o_row
    tl.store(p_counts, tl.where(m_r, b_count, 0), mask=inside)


def strong_key_counts(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    threshold: float = 0.01,
) -> torch.Tensor:
    """See ``reference.strong_key_counts``; keys are read through the block table.

    Args:
        queries: [R, Q, Hq, D].
        prompts: with token-row pages.

    Returns:
        [R, Hq, Q] int32.
    """
    num, num_rows, num_q_heads, _ = queries.shape
    counts = queries.new_empty((num, num_q_heads, num_rows), dtype=torch.int32)
    # small tiles of float32, whose products do not spill registers
    exact = queries.dtype == torch.float32
    tile = {"BLOCK_R": 32, "BLOCK_T": 16} if exact else {"BLOCK_R": 64, "BLOCK_T": 64}
    inputs, numbers, sizes = query_rows.arguments(
        queries, prompts, prompt_lens, scale, softcap, tile
    )
    rows = num_rows * (num_q_heads // prompts.num_kv_heads)
    _strong_keys_kernel[(num * prompts.num_kv_heads, triton.cdiv(rows, tile["BLOCK_R"]))](
        *inputs, instruction_len.contiguous(), counts, *numbers, log_share(threshold), **sizes
    )
    return counts
