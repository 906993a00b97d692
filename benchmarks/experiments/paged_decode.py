# SPDX-License-Identifier: Apache-2.0
"""Decode attention that walks head pages: its plain definition, and what runs on a device."""

from typing import Any

import torch

from vllm_kvcompress.kernels import HeldPages, PageLayout, reference, reference_decode


def paged_decode(queries: torch.Tensor, *args: Any) -> torch.Tensor:
    """The Triton kernels on a GPU, else :func:`definition`, whose arguments it takes."""
    if not queries.is_cuda:
        return definition(queries, *args)
    from experiments import decode_attention  # CPU installations may lack Triton

    return decode_attention.paged_decode(queries, *args)


def definition(
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
    ``reference_decode.head_page_tables`` says it is. A head that holds nothing gives zeros.

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
    reference_decode.head_page_tables(table, lengths, block_table, seq_lens, held, size)
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
