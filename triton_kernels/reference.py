# SPDX-License-Identifier: Apache-2.0
"""Plain float32 definitions of every operation: the specification that kernels are tested against.

All of them are batched over requests, run on any device and never ask the host for a value.
"""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels.reference_rows import (
    cover_votes,
    elite_attention,
    group_attention_sum,
    last_row_logits,
    row_logits,
)
from vllm_kvcompress.kernels.reference_scores import (
    bacon_calibrate,
    calibrate,
    head_counts,
    pool_prefix,
    select_tokens,
)

_ROWS_PER_TILE = 128
"""Rows whose probabilities over all keys are in memory at the same time."""


class PageLayout(NamedTuple):
    """How a head page keeps its elements.

    Attributes:
        key_index, value_index: [block_size * D] int64, offset inside the page of element (token, d)
            at token * D + d. None for both: token rows of D key elements followed by D value
            elements.
        block_size, head_size: tokens per page and D.
        key_scale, value_scale: what stored elements are multiplied by; 1 unless the pages are of a
            float8 type.
    """

    block_size: int
    head_size: int
    key_index: torch.Tensor | None = None
    value_index: torch.Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0


class PromptPages(NamedTuple):
    """Where the keys and values of N prompts stand in one layer.

    Attributes:
        pages: [num_pages, block_size * 2 * D] head pages of the layer.
        block_table: [N, B] int64; blocks past a prompt's end are arbitrary.
        num_kv_heads: Hkv; head h of block b is page b * Hkv + h.
        layout: of every page.
    """

    pages: torch.Tensor
    block_table: torch.Tensor
    num_kv_heads: int
    layout: PageLayout


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities of the last W prompt positions on each key.

    The softmax runs over all visible keys, the window's own included; only then columns t >= P - W
    are dropped (set to 0). Query heads of a group are reduced after the mean over rows.

    Args:
        queries: [N, W, Hq, D] of positions P-W .. P-1.
        keys: [N, Hkv, T, D] with T >= W; anything at t >= P.
        prompt_lens: [N] int64, P.
        softcap: cap * tanh(logit / cap) when not 0.
        reduction: over the G query heads of a KV head, "mean" or "max".

    Returns:
        Mean over the window and last row, each [N, Hkv, T] float32.
    """
    window, length = queries.shape[1], keys.shape[2]
    position = torch.arange(length, device=keys.device)
    query_pos = prompt_lens[:, None] - window + position[:window]  # [N, W]
    probs = row_logits(queries, keys, query_pos, scale, softcap).softmax(-1)
    last = probs[:, :, :, -1]
    if reduction == "mean":
        mean, last = probs.mean((2, 3)), last.mean(2)
    else:
        mean, last = probs.mean(3).amax(2), last.amax(2)
    outside = (position >= prompt_lens[:, None] - window)[:, None]
    return mean.masked_fill(outside, 0.0), last.masked_fill(outside, 0.0)


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """Keys or values of whole prompts in token order.

    Args:
        part: "key" or "value".

    Returns:
        [N, Hkv, B * block_size, D] in the pages' type; of float8 pages, float32 with their scale.
    """
    pages, block_table, num_kv_heads, layout = prompts
    num, num_blocks = block_table.shape
    heads = torch.arange(num_kv_heads, device=pages.device)
    page = block_table[:, None, :] * num_kv_heads + heads[:, None]  # [N, Hkv, B]
    rows = as_bytes(pages)[page].view(pages.dtype)  # [N, Hkv, B, block_size * 2 * D]
    size, head_size = layout.block_size, layout.head_size
    index = layout.key_index if part == "key" else layout.value_index
    if index is not None:
        rows = rows.index_select(3, index)
    else:
        rows = rows.unflatten(3, (size, 2, head_size))[..., 0 if part == "key" else 1, :]
    rows = rows.reshape(num, num_kv_heads, num_blocks * size, head_size)
    if not is_float8(pages.dtype):
        return rows
    return rows.float() * (layout.key_scale if part == "key" else layout.value_scale)


def is_float8(dtype: torch.dtype) -> bool:
    """Whether elements of this type come with a scale."""
    return dtype.is_floating_point and dtype.itemsize == 1


def as_bytes(elements: torch.Tensor) -> torch.Tensor:
    """Float8 as bytes, to be moved: not every torch can index it on a GPU. Others as they are."""
    return elements.view(torch.uint8) if is_float8(elements.dtype) else elements


def as_stored(prompts: PromptPages, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Keys and values as elements of the prompts' pages.

    Float8 takes the nearest number, and its largest for all that is larger, infinity included.

    Args:
        keys, values: [N, Hkv, K, D] float32.

    Returns:
        [N, Hkv, K, 2 * D] in the pages' type, as :func:`write_pages` takes them.
    """
    dtype, layout = prompts.pages.dtype, prompts.layout
    if not is_float8(dtype):
        return torch.cat([keys, values], dim=-1).to(dtype)
    rows = torch.cat([keys / layout.key_scale, values / layout.value_scale], dim=-1)
    limit = torch.finfo(dtype).max
    return rows.clamp(-limit, limit).to(dtype)


def stage_tokens(prompts: PromptPages, kept: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Copy kept tokens out of the prompts' pages, element by element whatever their type.

    Args:
        kept: [N, Hkv, K] int64 positions; entries beyond ``count`` are arbitrary.
        count: [N, Hkv] int64, positions of each head.

    Returns:
        [N, Hkv, K, 2 * D]: D key elements, then D value elements; garbage beyond ``count``.
    """
    pages, block_table, _, layout = prompts
    num, num_heads, _ = kept.shape
    size = layout.block_size
    block = (kept // size).clamp(max=block_table.shape[1] - 1)
    head = torch.arange(num_heads, device=pages.device)[:, None]
    source = block_table.gather(1, block.view(num, -1)).view_as(kept) * num_heads + head
    key_index, value_index = index_tables(layout, pages.device)
    token = kept % size
    element = torch.cat([key_index[token], value_index[token]], dim=-1)  # [N, Hkv, K, 2 * D]
    return pages[source[..., None], element]


def write_pages(
    prompts: PromptPages,
    staged: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    layer_pages: int = 0,
) -> None:
    """Write runs of staged tokens, in order, into the head pages of the kept blocks. In place.

    The n kept blocks offer a row of n * Hkv pages per layer: number i is block i % n of them, head
    i // n; numbers of the next layer follow on. Run x fills the pages with the numbers
    [page_start, page_start + page_count).

    Args:
        prompts: whose pages are written. Pages of one layer, or of all layers that share theirs.
        staged: [N, X, K, 2 * D] as from :func:`stage_tokens`, K a multiple of block_size. Entries
            beyond page_count * block_size go to page 0, which belongs to a block that nobody reads
            (vLLM's null block): cheaper than asking the host which of them there are.
        page_count, page_start: [N, X] int64.
        num_full_blocks, num_kept_blocks: [N] int64, m and n.
        layer_pages: pages from one layer to the next; 0 when ``prompts`` has one layer's only.
    """
    pages, block_table, num_heads, layout = prompts
    max_kept = staged.shape[2]
    size, head_size, device = layout.block_size, layout.head_size, pages.device
    index = torch.arange(max_kept // size, device=device)
    number = page_start[:, :, None] + index  # [N, X, pages]
    target = page_ids(number, block_table, num_full_blocks, num_kept_blocks, num_heads, layer_pages)
    target = target.masked_fill(index >= page_count[:, :, None], 0)
    key_index, value_index = index_tables(layout, device)
    element = torch.cat([key_index, value_index], dim=-1)  # [block_size, 2 * D]
    pages[target[..., None, None], element] = staged.view(*target.shape, size, 2 * head_size)


def page_ids(
    number: torch.Tensor,
    block_table: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    num_heads: int,
    layer_pages: int,
) -> torch.Tensor:
    """Ids of the pages with a number [N, ...] in the row of :func:`write_pages`."""
    kept = num_kept_blocks[:, None, None]
    layer = number // (kept * num_heads)
    within = number % (kept * num_heads)
    block = block_ids(num_full_blocks[:, None, None] - kept + within % kept, block_table)
    return layer * layer_pages + block * num_heads + within // kept


def block_ids(index: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Ids of the blocks with an index [N, ...] in a request's row; past its ends some block's."""
    index = index.clamp(0, block_table.shape[1] - 1)
    return block_table.gather(1, index.flatten(1).long()).view(index.shape)


def index_tables(layout: PageLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Element offsets of (token, d) for keys and for values, [block_size, D] each."""
    size, head_size = layout.block_size, layout.head_size
    if layout.key_index is not None and layout.value_index is not None:
        return layout.key_index.view(size, head_size), layout.value_index.view(size, head_size)
    index = torch.arange(size * 2 * head_size, device=device).view(size, 2, head_size)
    return index[:, 0], index[:, 1]


def key_attention_sum(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention that each key receives from the rows of a prefill chunk.

    Args:
        queries: [M, C, Hq, D] of the chunks, right-aligned: a request's rows are its last ones.
        lengths: [M] int64, rows of each request.
        positions: [M] int64, position of its first row.
        keys: [M, Hkv, T, D]; anything past the last row's position.

    Returns:
        [M, Hkv, T] float32, summed over rows, mean over the query heads of a KV head.
    """
    width, keys = queries.shape[1], keys.float()
    total = torch.zeros(keys.shape[:3], device=keys.device)
    index = torch.arange(width, device=keys.device) - width  # -1 is the last row
    row_position = positions[:, None] + lengths[:, None] + index  # [M, C]
    valid = index >= -lengths[:, None]
    for start in range(0, width, _ROWS_PER_TILE):
        tile = slice(start, start + _ROWS_PER_TILE)
        logits = row_logits(queries[:, tile], keys, row_position[:, tile], scale, softcap)
        probs = logits.softmax(-1)
        probs.masked_fill_(~valid[:, None, None, tile, None], 0.0)
        total += probs.sum(3).mean(2)
    return total


__all__ = [
    "PageLayout",
    "PromptPages",
    "as_bytes",
    "as_stored",
    "bacon_calibrate",
    "block_ids",
    "calibrate",
    "cover_votes",
    "elite_attention",
    "group_attention_sum",
    "head_counts",
    "index_tables",
    "is_float8",
    "key_attention_sum",
    "last_row_logits",
    "page_ids",
    "pool_prefix",
    "read_prompt",
    "row_logits",
    "select_tokens",
    "stage_tokens",
    "window_scores",
    "write_pages",
]
