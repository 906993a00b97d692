# SPDX-License-Identifier: Apache-2.0
"""Split-KV decode attention that walks head pages, without page tables in between.

Every KV head of every request is cut into splits of its own kept length, so heads of unlike lengths
become programs of like size: a head with four times the tokens gets four times the splits. How many
programs are launched follows from shapes alone, as graphs need it; those past a head's end leave at
once. A second kernel joins the splits by their log-sum-exps.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import page_tables, paged_keys
from vllm_kvcompress.kernels.reference import PageLayout
from vllm_kvcompress.kernels.reference_decode import HeldPages

_PROGRAMS = 4096
"""Launched per call, about: enough that those with work fill a large GPU."""
_FEWEST_SPLITS, _MOST_SPLITS = 16, 128
"""Of a head: room for one much longer than the others; few enough to join quickly."""
_TILE_BYTES = 16384
"""Of keys, and of values: small enough that three stages of both fit into shared memory."""


@triton.jit
def _split_tokens(kv_len, num_splits, min_tokens, BLOCK_T: tl.constexpr):
    """Tokens of every split of a head but its last, whole tiles."""
    share = tl.cdiv(kv_len, num_splits)
    return tl.maximum(tl.cdiv(share, BLOCK_T) * BLOCK_T, min_tokens)


@triton.jit
def _decode_splits_kernel(
    q_ptr,  # [R, Hkv, G, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    block_table_ptr,  # [R, B] int32
    seq_lens_ptr,  # [R] int32
    slots_ptr,  # [R] int64
    num_full_ptr,  # [S] int32
    num_kept_ptr,  # [S] int32
    count_ptr,  # [S, Hkv] int32
    start_ptr,  # [S, Hkv] int32
    partial_ptr,  # [R, Hkv, splits, G, D] float32
    lse_ptr,  # [R, Hkv, splits, G] float32
    scale,
    value_scale,
    softcap,
    num_heads,  # Hkv
    num_blocks,  # B
    block_table_stride,
    layer,
    layer_pages,
    min_tokens,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPANS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Attention of a group's queries over one split of their KV head, and its log-sum-exp."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    i_row, i_head = i_seq // num_heads, (i_seq % num_heads).to(tl.int32)
    slot, num_full, count, kv_len = page_tables.held_length(
        slots_ptr, seq_lens_ptr, num_full_ptr, count_ptr, i_row, i_head, num_heads, PAGE_TOKENS
    )
    tokens = _split_tokens(kv_len, num_splits, min_tokens, BLOCK_T)
    begin = i_split * tokens
    end = tl.minimum(begin + tokens, kv_len)
    if begin >= end:
        return

    num_kept = tl.load(num_kept_ptr + slot)
    start = tl.load(start_ptr + slot * num_heads + i_head)
    p_block_row = block_table_ptr + i_row * block_table_stride
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    m_q = (o_g < GROUP)[:, None] & m_d[None, :]
    o_q = o_g[:, None] * HEAD_SIZE + o_d[None, :]
    b_q = tl.load(q_ptr + i_seq * GROUP * HEAD_SIZE + o_q, mask=m_q, other=0.0)
    b_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_G,), tl.float32)
    b_out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < end
        page = page_tables.page_ids(
            p_block_row, o_t // PAGE_TOKENS, m_t, i_head, num_full, num_kept, count, start,
            num_blocks, num_heads, layer, layer_pages, SPANS,
        )  # fmt: skip
        p_row = pages_ptr + (page.to(tl.int64) * PAGE_TOKENS + o_t % PAGE_TOKENS) * (2 * HEAD_SIZE)
        b_k = tl.load(p_row[None, :] + o_d[:, None], mask=m_d[:, None] & m_t[None, :], other=0.0)
        # stale values may be NaN, which a probability of 0 does not hide
        m_v = m_t[:, None] & m_d[None, :]
        b_v = tl.load(p_row[:, None] + HEAD_SIZE + o_d[None, :], mask=m_v, other=0.0)
        b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
        b_z = tl.where(m_t[None, :], b_z, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_z, 1))
        decay = tl.exp(b_max - new_max)
        b_p = tl.exp(b_z - new_max[:, None])
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out *= decay[:, None]
        if EXACT:
            b_out = tl.dot(b_p, b_v.to(tl.float32), b_out, input_precision="ieee")
        else:
            b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out)
        b_max = new_max
    row = (i_seq * num_splits + i_split) * GROUP
    tl.store(partial_ptr + row * HEAD_SIZE + o_q, b_out * (value_scale / b_sum[:, None]), mask=m_q)
    tl.store(lse_ptr + row + o_g, b_max + tl.log(b_sum), mask=o_g < GROUP)


@triton.jit
def _join_splits_kernel(
    seq_lens_ptr,  # [R] int32
    slots_ptr,  # [R] int64
    num_full_ptr,  # [S] int32
    count_ptr,  # [S, Hkv] int32
    partial_ptr,  # [R, Hkv, splits, G, D] float32
    lse_ptr,  # [R, Hkv, splits, G] float32
    out_ptr,  # [R, Hkv, G, D]
    num_heads,  # Hkv
    num_splits,
    min_tokens,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Mean of one query head's splits, weighted by their sums of exponentials."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1)
    i_row, i_head = i_seq // num_heads, (i_seq % num_heads).to(tl.int32)
    _, _, _, kv_len = page_tables.held_length(
        slots_ptr, seq_lens_ptr, num_full_ptr, count_ptr, i_row, i_head, num_heads, PAGE_TOKENS
    )
    used = tl.cdiv(kv_len, _split_tokens(kv_len, num_splits, min_tokens, BLOCK_T))
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    b_max = tl.full((), float("-inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_out = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, used, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < used
        row = (i_seq * num_splits + o_s) * GROUP + i_g
        b_lse = tl.load(lse_ptr + row, mask=m_s, other=float("-inf"))
        p_partial = partial_ptr + row[:, None] * HEAD_SIZE + o_d[None, :]
        b_partial = tl.load(p_partial, mask=m_s[:, None] & m_d[None, :], other=0.0)
        new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        decay = tl.exp(b_max - new_max)
        weight = tl.exp(b_lse - new_max)
        b_sum = b_sum * decay + tl.sum(weight, 0)
        b_out = b_out * decay + tl.sum(weight[:, None] * b_partial, 0)
        b_max = new_max
    b_out /= tl.where(used > 0, b_sum, 1.0)  # nothing held: zeros
    p_out = out_ptr + (i_seq * GROUP + i_g) * HEAD_SIZE + o_d
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_d)


def split_plan(num_seqs: int, max_tokens: int) -> tuple[int, int]:
    """Splits per KV head, and the fewest tokens of a split, whole tiles.

    Args:
        num_seqs: R * Hkv.
        max_tokens: bound of every kv_len that the host knows.
    """
    min_tokens = 64 * min(max(num_seqs // 16, 1), 4)  # few heads have to fill the device, too
    splits = min(max(_PROGRAMS // num_seqs, _FEWEST_SPLITS), _MOST_SPLITS)
    return min(splits, triton.cdiv(max_tokens, min_tokens)), min_tokens


def paged_decode(
    queries: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    held: HeldPages,
    scale: float,
    softcap: float = 0.0,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """See ``paged_decode.definition``; K and V are read once. For token-row pages.

    Reads kv_len * 2 * D elements per KV head and what the tables say of them, and moves
    (D + 1) * G floats out and in per split of 64 to 256 tokens or more.
    """
    num_rows, num_q_heads, head_size = queries.shape
    if num_rows == 0:
        return torch.empty_like(queries)
    num_heads, num_blocks = held.page_count.shape[2], block_table.shape[1]
    group, num_seqs = num_q_heads // num_heads, num_rows * num_heads
    num_splits, min_tokens = split_plan(num_seqs, num_blocks * layout.block_size)
    block_d = max(16, triton.next_power_of_2(head_size))
    block_t = min(max(_TILE_BYTES // (block_d * pages.element_size()), 16), 64)
    sizes = {
        "GROUP": group,
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_D": block_d,
        "BLOCK_T": block_t,
    }
    partial = queries.new_empty((num_seqs, num_splits, group, head_size), dtype=torch.float32)
    lse = queries.new_empty((num_seqs, num_splits, group), dtype=torch.float32)
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    count, num_full = held.page_count.contiguous(), held.num_full_blocks
    _decode_splits_kernel[(num_seqs, num_splits)](
        queries.contiguous(),
        pages,
        block_table,
        seq_lens,
        held.slots,
        num_full,
        held.num_kept_blocks,
        count,
        held.page_start.contiguous(),
        partial,
        lse,
        scale * key_scale,
        value_scale,
        softcap,
        num_heads,
        num_blocks,
        block_table.stride(0),
        held.layer,
        held.layer_pages,
        min_tokens,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        SPANS=held.layer_pages != 0,
        HAS_SOFTCAP=softcap != 0,
        EXACT=queries.dtype == torch.float32,
        num_warps=8 if queries.dtype == torch.float32 else 4,  # float32 products take registers
        **sizes,
    )
    _join_splits_kernel[(num_seqs, group)](
        seq_lens,
        held.slots,
        num_full,
        count,
        partial,
        lse,
        out,
        num_heads,
        num_splits,
        min_tokens,
        BLOCK_S=16,
        **sizes,
    )
    return out
