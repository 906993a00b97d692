# SPDX-License-Identifier: Apache-2.0
"""Compaction of kept tokens: copied out into a staging buffer, then written to their pages.

Two launches, because sources and targets overlap and nothing orders the programs of one launch.
Float8 moves as bytes, which every GPU has.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PageLayout, PromptPages, as_bytes

_TOKENS_PER_PROGRAM = 32
_UNSPECIALIZED = ["num_prompts", "num_blocks", "staged_pages", "layer_pages"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _stage_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [R, B] int64
    kept_ptr,  # [R, H, K] int64
    count_ptr,  # [R, H] int64, pages
    start_ptr,  # [R, H] int64
    staged_ptr,  # [N, pages * block_size, 2 * D]
    num_prompts,  # N
    num_heads,
    num_blocks,
    max_kept,
    staged_pages,
    ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_heads, i_seq % num_heads
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_E)
    m_k = o_k < tl.minimum(tl.load(count_ptr + i_seq) * PAGE_TOKENS, max_kept)
    position = tl.load(kept_ptr + i_seq * max_kept + o_k, mask=m_k, other=0)
    block = tl.load(table_ptr + i_row * num_blocks + position // PAGE_TOKENS, mask=m_k, other=0)
    source = (block * num_heads + i_head) * PAGE_TOKENS + position % PAGE_TOKENS
    mask = m_k[:, None] & (o_e < ROW)[None, :]
    b_row = tl.load(pages_ptr + source[:, None] * ROW + o_e[None, :], mask=mask)
    first = i_row % num_prompts * staged_pages + tl.load(start_ptr + i_seq)
    target = first * PAGE_TOKENS + o_k
    tl.store(staged_ptr + target[:, None] * ROW + o_e[None, :], b_row, mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _write_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [N, B] int64
    num_pages_ptr,  # [N] int64
    num_full_ptr,  # [N] int64
    num_kept_ptr,  # [N] int64
    staged_ptr,  # [N, pages * block_size, 2 * D]
    num_heads,
    num_blocks,
    staged_pages,
    layer_pages,
    ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_prompt = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = tl.arange(0, BLOCK_E)
    m_k = o_k < tl.load(num_pages_ptr + i_prompt) * PAGE_TOKENS
    num_kept = tl.maximum(tl.load(num_kept_ptr + i_prompt), 1)
    number = o_k // PAGE_TOKENS
    within = number % (num_kept * num_heads)
    block = tl.load(num_full_ptr + i_prompt) - num_kept + within % num_kept
    block = tl.load(table_ptr + i_prompt * num_blocks + block, mask=m_k, other=0)
    page = block * num_heads + within // num_kept
    page += number // (num_kept * num_heads) * layer_pages
    target = page * PAGE_TOKENS + o_k % PAGE_TOKENS
    mask = m_k[:, None] & (o_e < ROW)[None, :]
    source = i_prompt * staged_pages * PAGE_TOKENS + o_k
    b_row = tl.load(staged_ptr + source[:, None] * ROW + o_e[None, :], mask=mask)
    tl.store(pages_ptr + target[:, None] * ROW + o_e[None, :], b_row, mask=mask)


def stage_tokens(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    staged: torch.Tensor,
) -> None:
    """See ``reference.stage_tokens``. For token-row pages; moves each element in and out."""
    num, num_heads, max_kept = kept.shape
    table = prompts.block_table.contiguous()
    _stage_kernel[(num * num_heads, triton.cdiv(max_kept, _TOKENS_PER_PROGRAM))](
        as_bytes(prompts.pages),
        table,
        kept.contiguous(),
        page_count.contiguous(),
        page_start.contiguous(),
        as_bytes(staged),
        len(staged),
        num_heads,
        table.shape[1],
        max_kept,
        staged.shape[1],
        **_sizes(prompts.layout),
    )


def write_pages(
    prompts: PromptPages,
    staged: torch.Tensor,
    num_pages: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    layer_pages: int,
) -> None:
    """See ``reference.write_pages``; pages without a staged one are not touched.

    For token-row pages; moves each element in and out.
    """
    table, layout = prompts.block_table.contiguous(), prompts.layout
    num, staged_pages, _ = staged.shape
    grid = (num, triton.cdiv(staged_pages * layout.block_size, _TOKENS_PER_PROGRAM))
    _write_kernel[grid](
        as_bytes(prompts.pages),
        table,
        num_pages.contiguous(),
        num_full_blocks.contiguous(),
        num_kept_blocks.contiguous(),
        as_bytes(staged.contiguous()),
        prompts.num_kv_heads,
        table.shape[1],
        staged_pages,
        layer_pages,
        **_sizes(layout),
    )


def _sizes(layout: PageLayout) -> dict[str, int]:
    row = 2 * layout.head_size
    return {
        "ROW": row,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_E": triton.next_power_of_2(row),
        "BLOCK_K": _TOKENS_PER_PROGRAM,
    }
