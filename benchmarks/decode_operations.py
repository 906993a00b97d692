# SPDX-License-Identifier: Apache-2.0
"""Decode attention over what compressed prompts keep, as ``kernel_bench.py`` times it.

One token of each of N requests, 11 tokens after its compacted pages. In the skewed case one head of
every request holds four times the mean, as far as the others keep enough for their window, and the
total is the same: an operation that cares takes longer. ``stock`` is vLLM's own attention over as
many bytes: all heads of a request hold the mean.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from experiments import paged_decode
from gpucheck.per_head_decode import Inputs as SameTokens
from gpucheck.per_head_decode import plain
from operations import (
    BLOCK_SIZE,
    WINDOW,
    Cost,
    Inputs,
    Operation,
    Shape,
    require,
    table_maker,
)
from rivals import Calls, FlashAttention, Rival, as_heads, flash_infer, x_formers

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import HeldPages, PageLayout

TAIL = 11  # tokens
SKEW = 4  # times the mean
STOCK = "stock"


class DecodeInputs(NamedTuple):
    """Arguments of ``paged_decode.definition``, in its order; then the tables that others need.

    Attributes:
        table, kv_len: of the per-head batch.
    """

    args: tuple
    table: torch.Tensor
    kv_len: torch.Tensor


def head_pages(shape: Shape, skewed: bool) -> list[int]:
    """Compacted pages of each KV head of a request; together n * Hkv."""
    mean, heads = shape.num_kept // BLOCK_SIZE, shape.num_kv_heads
    if not skewed or heads == 1:
        return [mean] * heads
    least = min(WINDOW // BLOCK_SIZE, mean)
    most = shape.length // BLOCK_SIZE - 1  # all that the prompt has
    first = min(SKEW * mean, mean * heads - least * (heads - 1), most)
    each, more = divmod(mean * heads - first, heads - 1)
    return [first, *(each + (i < more) for i in range(heads - 1))]


def decode_inputs(x: Inputs, skewed: bool) -> DecodeInputs:
    shape, device = x.shape, x.queries.device
    num, num_full = shape.num, shape.length // BLOCK_SIZE - 1

    def every(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device).expand(num, -1).contiguous()

    count = every(*head_pages(shape, skewed))
    start = (count.cumsum(1) - count).int()
    full, kept = every(num_full)[:, 0], every(shape.num_kept // BLOCK_SIZE)[:, 0]
    seq_lens = every(num_full * BLOCK_SIZE + TAIL)[:, 0]
    blocks = x.prompts.block_table.int()
    slots = torch.arange(num, device=device)
    held = HeldPages(slots, full, kept, count[None], start[None])
    tables = table_maker(kernels.head_page_tables, blocks, seq_lens, held)()
    queries = x.queries[:, -1].contiguous()
    scale = shape.head_size**-0.5
    args = (queries, x.prompts.pages, x.prompts.layout, blocks, seq_lens, held, scale)
    return DecodeInputs(args, *tables)


def decode_cost(shape: Shape) -> Cost:
    tokens = shape.num * shape.num_kv_heads * (shape.num_kept + TAIL)
    group = shape.num_q_heads // shape.num_kv_heads
    rows = 2 * 2 * shape.num * shape.num_q_heads * shape.head_size  # queries and results
    moved = 2 * 2 * shape.head_size * tokens + rows
    return Cost(moved, 4 * group * shape.head_size * tokens, 6 * shape.page_bytes)


def close(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Up to what 16 bits and another order of sums do."""
    other = other.reshape(ours.shape).float()
    return bool((ours.float() - other).abs().max() <= 0.02 * other.abs().max())


def same_bytes(x: Inputs, data: DecodeInputs) -> SameTokens:
    """As many tokens, the same ones in all heads, in the first blocks of every prompt."""
    queries, _, layout, _, _, _, _ = data.args
    length = x.shape.num_kept + TAIL
    table = x.prompts.block_table[:, : -(-length // layout.block_size)]
    pages = x.prompts.pages.view(-1, x.shape.num_kv_heads, *page_shape(layout))[table.flatten()]
    moved = torch.arange(table.numel(), dtype=torch.int32, device=table.device).view_as(table)
    return SameTokens(queries, pages, moved, torch.full_like(moved[:, 0], length))


def page_shape(layout: PageLayout) -> tuple[int, int]:
    return layout.block_size, 2 * layout.head_size


def ours_and_torch(data: DecodeInputs) -> tuple[Callable[[], torch.Tensor], ...]:
    return (
        lambda: paged_decode.paged_decode(*data.args),
        lambda: paged_decode.definition(*data.args),
    )


def decode_calls(x: Inputs, skewed: bool, jit: bool) -> Calls:
    data = decode_inputs(x, skewed)
    ours, definition = ours_and_torch(data)

    def right(result: torch.Tensor) -> bool:
        return close(ours(), result)

    queries, pages, _, blocks, seq_lens, held, _ = data.args
    rows = queries.view(len(data.table), -1, queries.shape[2])

    same = same_bytes(x, data)

    def stock():
        parts = same.pages.transpose(1, 2).contiguous().split(queries.shape[2], dim=3)
        flash = FlashAttention(queries, *parts, x.shape.length)
        schedule = flash.schedule(same.lengths)
        return lambda: flash(same.table, same.lengths, schedule)

    def shared():
        flash = FlashAttention(rows, *as_heads(pages, rows.shape[2]), x.shape.length)
        schedule = flash.schedule(data.kv_len)
        return lambda: flash(data.table, data.kv_len, schedule)

    def built():
        flash = FlashAttention(rows, *as_heads(pages, rows.shape[2]), x.shape.length)
        tables = table_maker(kernels.head_page_tables, blocks, seq_lens, held)
        return lambda: flash(*tables())

    def planned():
        return flash_infer(rows, pages, data.table, data.kv_len, jit)

    def split():
        return x_formers(rows, pages, data.table, data.kv_len)

    return {
        STOCK: Rival(stock, lambda result: close(result[:4], plain(same, 4))),
        "ours": ours,
        "torch": definition,
        # tables and schedule made once for all layers; or a table with each call and no schedule:
        # what layers of unlike budgets would cost if one launch did not make all of their tables
        "flash-attn": Rival(shared, right),
        "flash-attn+tables": Rival(built, right),
        "flashinfer": Rival(planned, right),
        "xformers": Rival(split, right),
    }


def decode_check(x: Inputs, skewed: bool) -> None:
    ours, definition = ours_and_torch(decode_inputs(x, skewed))
    require(close(definition(), ours()), "paged_decode")


def decode_operations(jit: bool = False) -> tuple[Operation, ...]:
    """Even and skewed; ``jit``: FlashInfer may compile its kernels."""
    return tuple(
        Operation(
            name,
            decode_cost,
            functools.partial(decode_calls, skewed=skewed, jit=jit),
            functools.partial(decode_check, skewed=skewed),
            "paged_decode",
            replayed=True,
            baseline=STOCK,
        )
        for name, skewed in (("paged_decode", False), ("paged_decode skewed", True))
    )
