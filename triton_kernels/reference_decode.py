# SPDX-License-Identifier: Apache-2.0
"""Plain float32 definition of decode attention over head pages."""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import reference
from vllm_kvcompress.kernels.reference import PageLayout


class HeldPages(NamedTuple):
    """Which head pages requests hold in one layer, by state slot.

    Attributes:
        slots: [R] int64, slot of each request.
        num_full_blocks, num_kept_blocks: [S] int32, m and n.
        page_count, page_start: [S, Hkv] int32, as in ``reference.write_pages``.
        layer, layer_pages: as in ``reference.head_page_tables``.
    """

    slots: torch.Tensor
    num_full_blocks: torch.Tensor
    num_kept_blocks: torch.Tensor
    page_count: torch.Tensor
    page_start: torch.Tensor
    layer: int = 0
    layer_pages: int = 0


def paged_decode(
    queries: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    held: HeldPages,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention of one token per request over what each KV head still holds.

    Head h of a request sees the first kv_len tokens of its own page table, which is what
    ``reference.head_page_tables`` says it is. A head that holds nothing gives zeros.

    Args:
        queries: [R, Hq, D]; query head i belongs to KV head i // (Hq / Hkv).
        pages: [num_pages, block_size * 2 * D] head pages, of one layer or of all.
        block_table: [R, B] int32.
        seq_lens: [R] int32, logical length, the new token included; 0 for padding rows.
        softcap: cap * tanh(logit / cap) when not 0.

    Returns:
        [R, Hq, D] in the queries' type.
    """
    slots, size, head_size = held.slots, layout.block_size, layout.head_size
    table, kv_len = reference.head_page_tables(
        block_table,
        seq_lens,
        held.num_full_blocks[slots],
        held.num_kept_blocks[slots],
        held.page_count[slots],
        held.page_start[slots],
        size,
        block_table.shape[1],
        held.layer,
        held.layer_pages,
    )
    movable = reference.as_bytes(pages)
    rows = movable[table.long()].view(pages.dtype)  # [R * Hkv, B, block_size * 2 * D]
    if layout.key_index is not None and layout.value_index is not None:
        keys, values = (rows[:, :, index] for index in (layout.key_index, layout.value_index))
    else:
        keys, values = rows.unflatten(2, (size, 2, head_size)).unbind(3)
    num_seqs, length = len(table), table.shape[1] * size
    keys = keys.reshape(num_seqs, length, head_size).float() * layout.key_scale
    values = values.reshape(num_seqs, length, head_size).float() * layout.value_scale
    group = queries.shape[1] // held.page_count.shape[1]
    logits = queries.float().view(num_seqs, group, head_size) @ keys.transpose(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.arange(length, device=pages.device) >= kv_len[:, None]  # [R * Hkv, T]
    logits.masked_fill_(hidden[:, None], float("-inf"))
    probs = logits.softmax(-1).masked_fill_(hidden[:, None], 0.0)  # all hidden: not NaN
    values.masked_fill_(hidden[:, :, None], 0.0)  # stale ones may be NaN
    return (probs @ values).view(queries.shape).to(queries.dtype)
