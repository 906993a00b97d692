# SPDX-License-Identifier: Apache-2.0
"""Compaction of kept tokens: gathered into a staging buffer, then written to their pages.

Two launches, because sources and targets overlap and nothing orders the programs of one launch.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PromptPages

_TOKENS_PER_PROGRAM = 32


@triton.jit
def _stage_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [N, B] int64
    kept_ptr,  # [N, H, K] int64
    count_ptr,  # [N, H] int64
    staged_ptr,  # [N, H, K, 2 * D]
    num_heads,
    num_blocks,
    max_kept,
    ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_heads, i_seq % num_heads
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_E)
    m_k = o_k < tl.load(count_ptr + i_seq) * PAGE_TOKENS
    position = tl.load(kept_ptr + i_seq * max_kept + o_k, mask=m_k, other=0)
    block = tl.load(table_ptr + i_row * num_blocks + position // PAGE_TOKENS, mask=m_k, other=0)
    source = (block * num_heads + i_head) * PAGE_TOKENS + position % PAGE_TOKENS
    mask = m_k[:, None] & (o_e < ROW)[None, :]
    b_row = tl.load(pages_ptr + source[:, None] * ROW + o_e[None, :], mask=mask)
    target = i_seq * max_kept + o_k
    tl.store(staged_ptr + target[:, None] * ROW + o_e[None, :], b_row, mask=mask)


@triton.jit
def _write_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [N, B] int64
    count_ptr,  # [N, H] int64
    start_ptr,  # [N, H] int64
    num_full_ptr,  # [N] int64
    num_kept_ptr,  # [N] int64
    staged_ptr,  # [N, H, K, 2 * D]
    num_heads,
    num_blocks,
    max_kept,
    ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row = i_seq // num_heads
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_E)
    m_k = o_k < tl.load(count_ptr + i_seq) * PAGE_TOKENS
    num_kept = tl.load(num_kept_ptr + i_row)
    number = tl.load(start_ptr + i_seq) + o_k // PAGE_TOKENS
    block = tl.load(num_full_ptr + i_row) - num_kept + number % num_kept
    block = tl.load(table_ptr + i_row * num_blocks + block, mask=m_k, other=0)
    target = (block * num_heads + number // num_kept) * PAGE_TOKENS + o_k % PAGE_TOKENS
    mask = m_k[:, None] & (o_e < ROW)[None, :]
    source = i_seq * max_kept + o_k
    b_row = tl.load(staged_ptr + source[:, None] * ROW + o_e[None, :], mask=mask)
    tl.store(pages_ptr + target[:, None] * ROW + o_e[None, :], b_row, mask=mask)


def compact_pages(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
) -> None:
    """See ``reference.compact_pages``; pages that no head owns are not touched.

    For token-row pages only. Moves each kept element four times: out, in, out, in.
    """
    pages, block_table, _, layout = prompts
    num, num_heads, max_kept = kept.shape
    row = 2 * layout.head_size
    staged = pages.new_empty((num, num_heads, max_kept, row))
    grid = (num * num_heads, triton.cdiv(max_kept, _TOKENS_PER_PROGRAM))
    table, count = block_table.contiguous(), page_count.contiguous()
    numbers = (num_heads, table.shape[1], max_kept)
    sizes = {
        "ROW": row,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_E": triton.next_power_of_2(row),
        "BLOCK_K": _TOKENS_PER_PROGRAM,
    }
    _stage_kernel[grid](pages, table, kept.contiguous(), count, staged, *numbers, **sizes)
    _write_kernel[grid](
        pages,
        table,
        count,
        page_start.contiguous(),
        num_full_blocks.contiguous(),
        num_kept_blocks.contiguous(),
        staged,
        *numbers,
        **sizes,
    )
