# SPDX-License-Identifier: Apache-2.0
"""Plain float32 definitions of every operation: the specification that kernels are tested against.

All of them are batched over rows, which are (layer, prompt) pairs: row l * N + n is layer l of
prompt n. They run on any device and never ask the host for a value.
"""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels.reference_budgets import apportion
from vllm_kvcompress.kernels.reference_grid import Grids, grid_balance, weigh_scores
from vllm_kvcompress.kernels.reference_rows import (
    cover_votes,
    elite_attention,
    group_attention_sum,
    last_row_logits,
    row_logits,
    strength_and_skewness,
    strong_key_counts,
)
from vllm_kvcompress.kernels.reference_scores import (
    bacon_calibrate,
    bacon_coherence,
    bacon_evidence,
    bacon_persistence,
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
    """

    block_size: int
    head_size: int
    key_index: torch.Tensor | None = None
    value_index: torch.Tensor | None = None


class PromptPages(NamedTuple):
    """Where the keys and values of R rows stand: (layer, prompt) pairs, layer by layer.

    Attributes:
        pages: [num_pages, block_size * 2 * D] head pages of all layers.
        block_table: [R, B] int64; blocks past a prompt's end are arbitrary. Head h of block b of a
            layer is page layer * layer_pages + b * Hkv + h, so a row's blocks are those of its
            prompt plus layer * layer_pages / Hkv.
        num_kv_heads: Hkv; head h of block b is page b * Hkv + h.
        layout: of every page.
        key_scale, value_scale: [R] float32, what stored elements are multiplied by; None, that is
            1, unless the pages are of a float8 type.
    """

    pages: torch.Tensor
    block_table: torch.Tensor
    num_kv_heads: int
    layout: PageLayout
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None


def window_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities of the last W prompt positions on each key.

    The softmax runs over all visible keys, the window's own included; only then columns t >= P - W
    are dropped (set to 0). Query heads of a group are reduced after the mean over rows.

    Args:
        queries: [R, W, Hq, D] of positions P-W .. P-1.
        keys: [R, Hkv, T, D] with T >= W; anything at t >= P.
        prompt_lens: [R] int64, P.
        scale: [R] float32, of the logits.
        softcap: cap * tanh(logit / cap) when not 0.
        reduction: over the G query heads of a KV head, "mean" or "max".

    Returns:
        Mean over the window and last row, each [R, Hkv, T] float32.
    """
    window, length = queries.shape[1], keys.shape[2]
    position = torch.arange(length, device=keys.device)
    query_pos = prompt_lens[:, None] - window + position[:window]  # [R, W]
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
        [R, Hkv, B * block_size, D] in the pages' type; of float8 pages, float32 with their scale.
    """
    pages, block_table, num_kv_heads, layout = prompts[:4]
    num, num_blocks = block_table.shape
    heads = torch.arange(num_kv_heads, device=pages.device)
    page = block_table[:, None, :] * num_kv_heads + heads[:, None]  # [R, Hkv, B]
    rows = as_bytes(pages)[page].view(pages.dtype)  # [R, Hkv, B, block_size * 2 * D]
    size, head_size = layout.block_size, layout.head_size
    index = layout.key_index if part == "key" else layout.value_index
    if index is not None:
        rows = rows.index_select(3, index)
    else:
        rows = rows.unflatten(3, (size, 2, head_size))[..., 0 if part == "key" else 1, :]
    rows = rows.reshape(num, num_kv_heads, num_blocks * size, head_size)
    if not is_float8(pages.dtype):
        return rows
    scale = prompts.key_scale if part == "key" else prompts.value_scale
    return rows.float() if scale is None else rows.float() * scale[:, None, None, None]


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
        keys, values: [R, Hkv, K, D] float32.

    Returns:
        [R, Hkv, K, 2 * D] in the pages' type: token rows as :func:`write_pages` takes them.
    """
    dtype = prompts.pages.dtype
    if not is_float8(dtype):
        return torch.cat([keys, values], dim=-1).to(dtype)
    if prompts.key_scale is not None:
        keys = keys / prompts.key_scale[:, None, None, None]
    if prompts.value_scale is not None:
        values = values / prompts.value_scale[:, None, None, None]
    rows = torch.cat([keys, values], dim=-1)
    limit = torch.finfo(dtype).max
    return rows.clamp(-limit, limit).to(dtype)


def stage_tokens(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    staged: torch.Tensor,
) -> None:
    """Copy kept tokens out of the prompts' pages to their places among those of their prompt.

    Elements are copied one by one, whatever their type. Token rows: D key elements, then D value
    elements. Pages of ``staged`` that no head of these rows owns are left alone.

    Args:
        kept: [R, Hkv, K] int64 positions; entries beyond page_count * block_size are arbitrary.
        page_count, page_start: [R, Hkv] int64, how many pages a head's tokens fill and the number
            of the first.
        staged: [N, pages, block_size * 2 * D]; row r writes into prompt r % N.
    """
    pages, block_table, _, layout = prompts[:4]
    num, num_heads, _ = kept.shape
    size, width = layout.block_size, 2 * layout.head_size
    block = (kept // size).clamp(0, block_table.shape[1] - 1)
    head = torch.arange(num_heads, device=pages.device)[:, None]
    source = block_table.gather(1, block.view(num, -1)).view_as(kept) * num_heads + head
    key_index, value_index = index_tables(layout, pages.device)
    token = kept % size
    element = torch.cat([key_index[token], value_index[token]], dim=-1)  # [R, Hkv, K, 2 * D]
    rows = as_bytes(pages)[source[..., None], element]

    index = torch.arange(kept.shape[2], device=pages.device)
    prompt = torch.arange(num, device=pages.device)[:, None, None] % len(staged)
    target = (prompt * staged.shape[1] + page_start[..., None]) * size + index
    num_targets = staged.numel() // width
    target = target.masked_fill(index >= page_count[..., None] * size, num_targets)
    # one more row takes what is beyond a head's pages
    flat = torch.nn.functional.pad(as_bytes(staged).view(num_targets, width), (0, 0, 0, 1))
    flat[target] = rows
    as_bytes(staged).view(num_targets, width).copy_(flat[:-1])


def write_pages(
    prompts: PromptPages,
    staged: torch.Tensor,
    num_pages: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    layer_pages: int,
) -> None:
    """Write staged pages into the head pages of the kept blocks. In place.

    The n kept blocks offer n * Hkv pages per layer. Their numbers run over (layer, page in the
    layer): number i of a layer is block i % n of them, head i // n.

    Args:
        prompts: whose pages are written, with the block tables [N, B] of the N prompts, not
            shifted by any layer.
        staged: [N, pages, block_size * 2 * D] token rows as of :func:`stage_tokens`; page i fills
            the page with number i.
        num_pages: [N] int64. Later pages of ``staged`` go to page 0, which belongs to a block that
            nobody reads (vLLM's null block): cheaper than asking the host which of them there are.
        num_full_blocks, num_kept_blocks: [N] int64, m and n.
        layer_pages: pages from one layer to the next.
    """
    pages, block_table, num_heads, layout = prompts[:4]
    size, head_size, device = layout.block_size, layout.head_size, pages.device
    number = torch.arange(staged.shape[1], device=device).expand(staged.shape[:2])  # [N, pages]
    target = page_ids(number, block_table, num_full_blocks, num_kept_blocks, num_heads, layer_pages)
    target = target.masked_fill(number >= num_pages[:, None], 0)
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
    """Ids of the pages with a number [N, ...], see :func:`write_pages`."""
    shape = (-1, *[1] * (number.dim() - 1))
    kept, full = num_kept_blocks.view(shape), num_full_blocks.view(shape)
    layer = number // (kept * num_heads)
    within = number % (kept * num_heads)
    block = block_ids(full - kept + within % kept, block_table)
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
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention that each key receives from the rows of a prefill chunk.

    Args:
        queries: [M, C, Hq, D] of the chunks, right-aligned: a request's rows are its last ones.
        lengths: [M] int64, rows of each request.
        positions: [M] int64, position of its first row.
        keys: [M, Hkv, T, D]; anything past the last row's position.
        scale: [M] float32, of the logits.

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
    "Grids",
    "PageLayout",
    "PromptPages",
    "apportion",
    "as_bytes",
    "as_stored",
    "bacon_calibrate",
    "bacon_coherence",
    "bacon_evidence",
    "bacon_persistence",
    "block_ids",
    "cover_votes",
    "elite_attention",
    "grid_balance",
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
    "strength_and_skewness",
    "strong_key_counts",
    "weigh_scores",
    "window_scores",
    "write_pages",
]
