# SPDX-License-Identifier: Apache-2.0
"""Compaction of kept tokens: copied out into a staging buffer, then written to their pages.

Two launches, because sources and targets overlap and nothing orders the programs of one launch.
Elements of one byte move as bytes, which every GPU has, float8 or not.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PageLayout, PromptPages

_TOKENS_PER_PROGRAM = 32


@triton.jit
def _stage_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [N, B] int64
    kept_ptr,  # [N, H, K] int64
    count_ptr,  # [N, H] int64, tokens
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
    m_k = o_k < tl.load(count_ptr + i_seq)
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
    count_ptr,  # [N, X] int64, pages
    start_ptr,  # [N, X] int64
    num_full_ptr,  # [N] int64
    num_kept_ptr,  # [N] int64
    staged_ptr,  # [N, X, K, 2 * D]
    num_runs,  # X
    num_heads,
    num_blocks,
    max_kept,
    layer_pages,
    ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row = i_seq // num_runs
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_E)
    m_k = o_k < tl.load(count_ptr + i_seq) * PAGE_TOKENS
    num_kept = tl.load(num_kept_ptr + i_row)
    number = tl.load(start_ptr + i_seq) + o_k // PAGE_TOKENS
    within = number % (num_kept * num_heads)
    block = tl.load(num_full_ptr + i_row) - num_kept + within % num_kept
    block = tl.load(table_ptr + i_row * num_blocks + block, mask=m_k, other=0)
    page = block * num_heads + within // num_kept
    page += number // (num_kept * num_heads) * layer_pages
    target = page * PAGE_TOKENS + o_k % PAGE_TOKENS
    mask = m_k[:, None] & (o_e < ROW)[None, :]
    source = i_seq * max_kept + o_k
    b_row = tl.load(staged_ptr + source[:, None] * ROW + o_e[None, :], mask=mask)
    tl.store(pages_ptr + target[:, None] * ROW + o_e[None, :], b_row, mask=mask)


def stage_tokens(prompts: PromptPages, kept: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """See ``reference.stage_tokens``. For token-row pages; moves each element in and out."""
    pages, block_table, _, layout = prompts
    num, num_heads, max_kept = kept.shape
    staged = pages.new_empty((num, num_heads, max_kept, 2 * layout.head_size))
    table = block_table.contiguous()
    _stage_kernel[_grid(staged)](
        _movable(pages),
        table,
        kept.contiguous(),
        count.contiguous(),
        _movable(staged),
        num_heads,
        table.shape[1],
        max_kept,
        **_sizes(layout),
    )
    return staged


def write_pages(
    prompts: PromptPages,
    staged: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    layer_pages: int = 0,
) -> None:
    """See ``reference.write_pages``; pages that no head owns are not touched.

    For token-row pages; moves each element in and out.
    """
    pages, block_table, num_kv_heads, layout = prompts
    _, num_runs, max_kept, _ = staged.shape
    table = block_table.contiguous()
    _write_kernel[_grid(staged)](
        _movable(pages),
        table,
        page_count.contiguous(),
        page_start.contiguous(),
        num_full_blocks.contiguous(),
        num_kept_blocks.contiguous(),
        _movable(staged.contiguous()),
        num_runs,
        num_kv_heads,
        table.shape[1],
        max_kept,
        layer_pages,
        **_sizes(layout),
    )


def _movable(elements: torch.Tensor) -> torch.Tensor:
    return elements.view(torch.uint8) if elements.dtype.itemsize == 1 else elements


def _grid(staged: torch.Tensor) -> tuple[int, int]:
    num, num_runs, max_kept, _ = staged.shape
    return num * num_runs, triton.cdiv(max_kept, _TOKENS_PER_PROGRAM)


def _sizes(layout: PageLayout) -> dict[str, int]:
    row = 2 * layout.head_size
    return {
        "ROW": row,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_E": triton.next_power_of_2(row),
        "BLOCK_K": _TOKENS_PER_PROGRAM,
    }
