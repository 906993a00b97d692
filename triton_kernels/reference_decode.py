# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of what decode steps do with head pages."""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import reference
from vllm_kvcompress.kernels.reference import PageLayout


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
    """Attention of one token per request over what each KV head still holds.

    Head h of a request sees the first kv_len tokens of its own page table, which is what
    :func:`head_page_tables` says it is. A head that holds nothing gives zeros.

    Args:
        queries: [R, Hq, D]; query head i belongs to KV head i // (Hq / Hkv).
        pages: [num_pages, block_size * 2 * D] head pages, of one layer or of all.
        block_table: [R, B] int32.
        seq_lens: [R] int32, logical length, the new token included; 0 for padding rows.
        held: of one layer.
        softcap: cap * tanh(logit / cap) when not 0.
        key_scale, value_scale: what stored elements are multiplied by; 1 unless they are float8.

    Returns:
        [R, Hq, D] in the queries' type.
    """
    size, head_size = layout.block_size, layout.head_size
    num_heads = held.page_count.shape[2]
    table = block_table.new_zeros(1, len(block_table) * num_heads, block_table.shape[1])
    lengths = seq_lens.new_zeros(1, len(seq_lens) * num_heads)
    head_page_tables(table, lengths, block_table, seq_lens, held, size)
    table, kv_len = table[0], lengths[0]
    movable = reference.as_bytes(pages)
    rows = movable[table.long()].view(pages.dtype)  # [R * Hkv, B, block_size * 2 * D]
    if layout.key_index is not None and layout.value_index is not None:
        keys, values = (rows[:, :, index] for index in (layout.key_index, layout.value_index))
    else:
        keys, values = rows.unflatten(2, (size, 2, head_size)).unbind(3)
    num_seqs, length = len(table), table.shape[1] * size
    keys = keys.reshape(num_seqs, length, head_size).float() * key_scale
    values = values.reshape(num_seqs, length, head_size).float() * value_scale
    group = queries.shape[1] // num_heads
    logits = queries.float().view(num_seqs, group, head_size) @ keys.transpose(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.arange(length, device=pages.device) >= kv_len[:, None]  # [R * Hkv, T]
    logits.masked_fill_(hidden[:, None], float("-inf"))
    probs = logits.softmax(-1).masked_fill_(hidden[:, None], 0.0)  # all hidden: not NaN
    values.masked_fill_(hidden[:, :, None], 0.0)  # stale ones may be NaN
    return (probs @ values).view(queries.shape).to(queries.dtype)
