# SPDX-License-Identifier: Apache-2.0
"""Keys of one head through the block table, and their logits: what attention kernels share."""

import triton
import triton.language as tl


@triton.jit
def load_keys(
    pages_ptr,
    table_ptr,
    i_row,
    i_head,
    o_key,
    m_key,
    num_kv_heads,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys [BLOCK_D, keys] of positions ``o_key`` of one row and KV head; 0 where masked.

    They come as they are stored: those of float8 pages lack ``PromptPages.key_scale``.
    """
    o_d = tl.arange(0, BLOCK_D)
    page = tl.load(table_ptr + i_row * num_blocks + o_key // PAGE_TOKENS, mask=m_key, other=0)
    page = page.to(tl.int64) * num_kv_heads + i_head
    p_k = (page * PAGE_TOKENS + o_key % PAGE_TOKENS) * (2 * HEAD_SIZE)
    mask = (o_d < HEAD_SIZE)[:, None] & m_key[None, :]
    return tl.load(pages_ptr + p_k[None, :] + o_d[:, None], mask=mask, other=0.0)


@triton.jit
def row_scale(scale_ptr, key_scale_ptr, i_row):
    """What the logits of a row are multiplied by; its keys as stored lack their own scale."""
    scale = tl.load(scale_ptr + i_row)
    if key_scale_ptr is not None:
        scale *= tl.load(key_scale_ptr + i_row)
    return scale


@triton.jit
def logits(b_q, b_k, scale, softcap, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Logits [rows, keys] of queries [rows, BLOCK_D] and keys [BLOCK_D, keys]; nothing is hidden.

    EXACT: in float32, for inputs in float32. Else keys are taken in the type of the queries, which
    holds every float8 number; their scale is part of ``scale``.
    """
    if EXACT:
        b_z = tl.dot(b_q.to(tl.float32), b_k.to(tl.float32), input_precision="ieee") * scale
    else:
        b_z = tl.dot(b_q, b_k.to(b_q.dtype)) * scale
    if HAS_SOFTCAP:
        half = tl.exp(-2.0 * tl.abs(b_z / softcap))  # tanh from a decaying exponential
        b_z = tl.where(b_z < 0, -1.0, 1.0) * softcap * (1.0 - half) / (1.0 + half)
    return b_z
