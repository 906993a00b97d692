# SPDX-License-Identifier: Apache-2.0
"""Keys or values of whole prompts in token order, for methods that need them as one tensor."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PromptPages, is_float8

_TOKENS_PER_PROGRAM = 32


@triton.jit
def _read_kernel(
    pages_ptr,  # [num_pages * block_size, 2 * D]
    table_ptr,  # [R, B] int64
    scale_ptr,  # [R] float32, or None
    rows_ptr,  # [R, H, T, D]
    num_heads,
    num_blocks,
    first,  # element of a token's row: 0 for keys, D for values
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCALED: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_heads, i_seq % num_heads
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < num_blocks * PAGE_TOKENS
    block = tl.load(table_ptr + i_row * num_blocks + o_t // PAGE_TOKENS, mask=m_t, other=0)
    source = (block * num_heads + i_head) * PAGE_TOKENS + o_t % PAGE_TOKENS
    mask = m_t[:, None] & (o_d < HEAD_SIZE)[None, :]
    p_source = pages_ptr + source[:, None] * (2 * HEAD_SIZE) + first + o_d[None, :]
    target = i_seq * num_blocks * PAGE_TOKENS + o_t
    p_target = rows_ptr + target[:, None] * HEAD_SIZE + o_d[None, :]
    b_rows = tl.load(p_source, mask=mask)
    if SCALED:
        b_rows = b_rows.to(tl.float32)
        if scale_ptr is not None:
            b_rows *= tl.load(scale_ptr + i_row)
    tl.store(p_target, b_rows, mask=mask)


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """See ``reference.read_prompt``. For token-row pages; moves each element in and out."""
    pages, block_table, num_kv_heads, layout = prompts[:4]
    num, num_blocks = block_table.shape
    length = num_blocks * layout.block_size
    scaled, is_key = is_float8(pages.dtype), part == "key"
    dtype = torch.float32 if scaled else pages.dtype
    rows = pages.new_empty((num, num_kv_heads, length, layout.head_size), dtype=dtype)
    _read_kernel[(num * num_kv_heads, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        pages,
        block_table.contiguous(),
        prompts.key_scale if is_key else prompts.value_scale,
        rows,
        num_kv_heads,
        num_blocks,
        0 if is_key else layout.head_size,
        HEAD_SIZE=layout.head_size,
        PAGE_TOKENS=layout.block_size,
        BLOCK_D=triton.next_power_of_2(layout.head_size),
        BLOCK_T=_TOKENS_PER_PROGRAM,
        SCALED=scaled,
    )
    return rows
