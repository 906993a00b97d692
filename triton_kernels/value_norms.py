# SPDX-License-Identifier: Apache-2.0
"""Norms of what values make of a layer's output, straight from paged values."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference import PromptPages


@triton.jit(do_not_specialize=["num_blocks", "num_prompts"])
def _output_norms_kernel(
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    grams_ptr,  # [L, Hq, D, D] float32
    value_scale_ptr,  # [R] float32, or None
    norms_ptr,  # [R, Hkv, T] float32
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_prompts,  # N
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXACT: tl.constexpr,
):
    """sqrt(v G v) of a tile of values, mean over the query heads of their group."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_kv_heads, i_seq % num_kv_heads
    group = num_q_heads // num_kv_heads
    length = num_blocks * PAGE_TOKENS
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < length, o_d < HEAD_SIZE
    page = tl.load(table_ptr + i_row * num_blocks + o_t // PAGE_TOKENS, mask=m_t, other=0)
    page = page.to(tl.int64) * num_kv_heads + i_head
    p_v = pages_ptr + (page * PAGE_TOKENS + o_t % PAGE_TOKENS) * (2 * HEAD_SIZE) + HEAD_SIZE
    m_v = m_t[:, None] & m_d[None, :]
    b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_v, other=0.0).to(tl.float32)
    p_grams = (
        grams_ptr + ((i_row // num_prompts) * num_q_heads + i_head * group) * HEAD_SIZE * HEAD_SIZE
    )
    b_norm = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(group):
        b_square = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, HEAD_SIZE, BLOCK_E):  # some columns of G: all would spill registers
            o_e = start + tl.arange(0, BLOCK_E)
            m_e = o_e < HEAD_SIZE
            b_gram = tl.load(
                p_grams + o_d[:, None] * HEAD_SIZE + o_e[None, :],
                mask=m_d[:, None] & m_e[None, :],
                other=0.0,
            )
            if EXACT:
                b_made = tl.dot(b_v, b_gram, input_precision="ieee")
            else:
                b_made = tl.dot(b_v, b_gram, input_precision="tf32")
            b_some = tl.load(
                p_v[:, None] + o_e[None, :], mask=m_t[:, None] & m_e[None, :], other=0.0
            )
            b_square += tl.sum(b_made * b_some.to(tl.float32), 1)
        b_norm += tl.sqrt(tl.maximum(b_square, 0.0))
        p_grams += HEAD_SIZE * HEAD_SIZE
    b_norm = b_norm / group
    if value_scale_ptr is not None:
        b_norm *= tl.load(value_scale_ptr + i_row)
    tl.store(norms_ptr + i_seq * length + o_t, b_norm, mask=m_t)


def output_norms(prompts: PromptPages, grams: torch.Tensor) -> torch.Tensor:
    """See ``reference_paged.output_norms``. For token-row pages; each value is read once.

    Products of 16-bit and float8 values are taken in TF32.
    """
    pages, block_table, num_kv_heads, layout = prompts[:4]
    num, num_blocks = block_table.shape
    length = num_blocks * layout.block_size
    norms = torch.empty((num, num_kv_heads, length), device=pages.device)
    exact, block_d = pages.dtype == torch.float32, max(16, triton.next_power_of_2(layout.head_size))
    # what larger GPUs only have room for: registers of float32 products, shared memory of tiles
    tile = 32 if exact or block_d > 128 else 64
    _output_norms_kernel[(num * num_kv_heads, triton.cdiv(length, tile))](
        pages,
        block_table.contiguous(),
        grams.contiguous(),
        prompts.value_scale,
        norms,
        grams.shape[1],
        num_kv_heads,
        num_blocks,
        num // len(grams),
        HEAD_SIZE=layout.head_size,
        PAGE_TOKENS=layout.block_size,
        BLOCK_D=block_d,
        BLOCK_E=min(32, block_d),
        BLOCK_T=tile,
        EXACT=exact,
        num_warps=8 if exact else 4,
    )
    return norms
