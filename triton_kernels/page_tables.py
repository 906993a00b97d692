# SPDX-License-Identifier: Apache-2.0
"""Page tables of virtual sequences, one launch for all of them."""

import torch
import triton
import triton.language as tl


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
    block_table_ptr,  # [R, B] int32
    seq_lens_ptr,  # [R] int32
    num_full_ptr,  # [R] int32
    num_kept_ptr,  # [R] int32
    count_ptr,  # [R, H] int32
    start_ptr,  # [R, H] int32
    table_ptr,  # [R * H, width] int32
    kv_len_ptr,  # [R * H] int32
    num_blocks,  # B
    block_table_stride,
    width,
    num_heads,
    layer,
    layer_pages,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    i_row = i_seq // num_heads
    i_head = (i_seq % num_heads).to(tl.int32)

    num_full = tl.load(num_full_ptr + i_row)
    num_kept = tl.load(num_kept_ptr + i_row)
    count = tl.load(count_ptr + i_seq)
    start = tl.load(start_ptr + i_seq)

    o_page = i_tile * TILE + tl.arange(0, TILE)
    m_page = o_page < width
    page = page_ids(
        block_table_ptr + i_row * block_table_stride, o_page, m_page, i_head, num_full, num_kept,
        count, start, num_blocks, num_heads, layer, layer_pages, SPANS=True,
    )  # fmt: skip
    tl.store(table_ptr + i_seq * width + o_page, page, mask=m_page)

    if i_tile == 0:
        seq_len = tl.load(seq_lens_ptr + i_row)
        kv_len = seq_len + (count - num_full) * BLOCK_SIZE
        tl.store(kv_len_ptr + i_seq, tl.maximum(kv_len, 0))


def head_page_tables(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    block_size: int,
    width: int,
    layer: int = 0,
    layer_pages: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.head_page_tables``. Moves 4 bytes in and out per table entry."""
    num_rows, num_heads = page_count.shape
    table = torch.empty(num_rows * num_heads, width, dtype=torch.int32, device=block_table.device)
    kv_len = torch.empty(num_rows * num_heads, dtype=torch.int32, device=block_table.device)
    tile = min(1024, triton.next_power_of_2(width))
    _head_page_tables_kernel[(num_rows * num_heads, triton.cdiv(width, tile))](
        block_table,
        seq_lens,
        num_full_blocks,
        num_kept_blocks,
        page_count,
        page_start,
        table,
        kv_len,
        block_table.shape[1],
        block_table.stride(0),
        width,
        num_heads,
        layer,
        layer_pages,
        BLOCK_SIZE=block_size,
        TILE=tile,
    )
    return table, kv_len
