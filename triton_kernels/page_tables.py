# SPDX-License-Identifier: Apache-2.0
"""Page tables of a per-head batch, one launch for all layers."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference_decode import HeldPages


@triton.jit
def held_length(
    slots_ptr, seq_lens_ptr, num_full_ptr, count_ptr, i_row, i_head, num_heads,
    PAGE_TOKENS: tl.constexpr,
):  # fmt: skip
    """Slot of a request, m, its compacted pages, and kv_len of one of its KV heads in a layer."""
    slot = tl.load(slots_ptr + i_row).to(tl.int64)
    num_full = tl.load(num_full_ptr + slot)
    count = tl.load(count_ptr + slot * num_heads + i_head)
    kv_len = tl.load(seq_lens_ptr + i_row) + (count - num_full) * PAGE_TOKENS
    return slot, num_full, count, tl.maximum(kv_len, 0)


@triton.jit
def page_ids(
    block_row_ptr,
    o_page,
    m_page,
    i_head,
    num_full,
    num_kept,
    count,
    start,
    num_blocks,
    num_heads,
    layer,
    layer_pages,
    SPANS: tl.constexpr,
):
    """Ids of the pages with an index [...] in the page table of one request and KV head.

    Past the head's last page they are ids of some page. SPANS: the runs of kept pages may reach
    into other layers.
    """
    number = start + o_page
    compacted = o_page < count
    within = number
    owner = layer
    if SPANS:
        within = number % (num_kept * num_heads)
        owner = tl.where(compacted, number // (num_kept * num_heads), layer)
    block = tl.where(compacted, num_full - num_kept + within % num_kept, num_full + o_page - count)
    block = tl.minimum(tl.maximum(block, 0), num_blocks - 1)
    head = tl.where(compacted, within // num_kept, i_head)
    b_block = tl.load(block_row_ptr + block, mask=m_page, other=0)
    return owner * layer_pages + b_block * num_heads + head


@triton.jit
def _head_page_tables_kernel(
    table_ptr,  # [L, R * H, W] int32
    kv_len_ptr,  # [L, R * H] int32
    block_table_ptr,  # [R, B] int32
    seq_lens_ptr,  # [R] int32
    slots_ptr,  # [R] int64
    num_full_ptr,  # [S] int32
    num_kept_ptr,  # [S] int32
    count_ptr,  # [L, S, H] int32
    start_ptr,  # [L, S, H] int32
    num_blocks,  # B
    block_table_stride,
    width,  # W
    num_slots,  # S
    num_heads,
    first_layer,
    layer_pages,
    PAGE_TOKENS: tl.constexpr,
    SPANS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pages that one KV head of one request has in use in one layer."""
    i_seq = tl.program_id(0)
    i_layer = tl.program_id(1)
    i_row, i_head = i_seq // num_heads, i_seq % num_heads
    o_layer = i_layer * num_slots * num_heads
    slot, num_full, count, kv_len = held_length(
        slots_ptr, seq_lens_ptr, num_full_ptr, count_ptr + o_layer, i_row, i_head, num_heads,
        PAGE_TOKENS,
    )  # fmt: skip
    num_kept = tl.load(num_kept_ptr + slot)
    start = tl.load(start_ptr + o_layer + slot * num_heads + i_head)

    i_run = i_layer.to(tl.int64) * tl.num_programs(0) + i_seq
    tl.store(kv_len_ptr + i_run, kv_len)
    p_block_row = block_table_ptr + i_row.to(tl.int64) * block_table_stride
    used = tl.minimum(tl.cdiv(kv_len, PAGE_TOKENS), width)
    for first in range(0, used, TILE):
        o_page = first + tl.arange(0, TILE)
        m_page = o_page < used
        page = page_ids(
            p_block_row, o_page, m_page, i_head, num_full, num_kept, count, start, num_blocks,
            num_heads, first_layer + i_layer, layer_pages, SPANS,
        )  # fmt: skip
        tl.store(table_ptr + i_run * width + o_page, page, mask=m_page)


def head_page_tables(
    table: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    held: HeldPages,
    block_size: int,
) -> None:
    """See ``reference_decode.head_page_tables``. Only the block table's rows may be apart.

    Moves 4 bytes in and out per page in use.
    """
    num_layers, num_slots, num_heads = held.page_count.shape
    _head_page_tables_kernel[(len(held.slots) * num_heads, num_layers)](
        table,
        kv_len,
        block_table,
        seq_lens,
        held.slots,
        held.num_full_blocks,
        held.num_kept_blocks,
        held.page_count,
        held.page_start,
        block_table.shape[1],
        block_table.stride(0),
        table.shape[2],
        num_slots,
        num_heads,
        held.layer,
        held.layer_pages,
        PAGE_TOKENS=block_size,
        SPANS=held.layer_pages != 0,
        TILE=256,
    )
