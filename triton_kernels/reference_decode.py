# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of what decode steps do with head pages."""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import reference


class HeldPages(NamedTuple):
    """Which head pages requests hold in L layers, by state slot.

    Attributes:
        slots: [R] int64, slot of each request.
        num_full_blocks, num_kept_blocks: [S] int32, m and n. Not compressed: 0 and 1.
        page_count, page_start: [L, S, Hkv] int32, as in ``reference.stage_tokens``.
        layer: the first of the layers.
        layer_pages: from one layer to the next in an array of all layers' pages; 0 when every layer
            has its own array.
    """

    slots: torch.Tensor
    num_full_blocks: torch.Tensor
    num_kept_blocks: torch.Tensor
    page_count: torch.Tensor
    page_start: torch.Tensor
    layer: int = 0
    layer_pages: int = 0


def head_page_tables(
    table: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    held: HeldPages,
    block_size: int,
) -> None:
    """Write page table and length of each (layer, request, KV head) as a sequence of its own.

        [ the head's compacted pages | tail page | decode pages ... ]

    An uncompressed request's table lists the pages of its blocks. Entries past the length are left
    alone.

    Args:
        table: [L, R * Hkv, W] int32, page ids; written.
        kv_len: [L, R * Hkv] int32; written.
        block_table: [R, B] int32.
        seq_lens: [R] int32, logical length; 0 for padding rows.
    """
    slots, layer_pages = held.slots, held.layer_pages
    num_layers, _, num_heads = held.page_count.shape
    width, device = table.shape[2], table.device
    m, n = held.num_full_blocks[slots], held.num_kept_blocks[slots]
    # [R, L * Hkv], and with pages [R, L * Hkv, W]
    count, start = (
        pages[:, slots].transpose(0, 1).flatten(1) for pages in (held.page_count, held.page_start)
    )
    index = torch.arange(width, dtype=torch.int32, device=device)
    compacted = reference.page_ids(
        start[:, :, None] + index, block_table, m, n, num_heads, layer_pages
    )
    block = reference.block_ids(m[:, None, None] + index - count[:, :, None], block_table)
    run = torch.arange(num_layers * num_heads, dtype=torch.int32, device=device)[:, None]
    layer = held.layer + run // num_heads
    uncompressed = layer * layer_pages + block * num_heads + run % num_heads
    pages = torch.where(index < count[:, :, None], compacted, uncompressed)
    length = (seq_lens[:, None] + (count - m[:, None]) * block_size).clamp_(min=0)

    def by_layer(of_request: torch.Tensor) -> torch.Tensor:
        return of_request.unflatten(1, (num_layers, num_heads)).transpose(0, 1).flatten(1, 2)

    used = index * block_size < by_layer(length)[:, :, None]
    table.copy_(torch.where(used, by_layer(pages), table))
    kv_len.copy_(by_layer(length))
