# SPDX-License-Identifier: Apache-2.0
"""Plain float32 definitions of every operation: the specification that kernels are tested against.

All of them are batched over requests, run on any device and never ask the host for a value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

_EPS = 1e-8


class PageLayout(NamedTuple):
    """Where a head page keeps an element, as offsets inside the page.

    Attributes:
        key_index, value_index: [block_size * D] int64, element (token, d) at token * D + d. None
            for both: token rows of D key elements followed by D value elements.
        block_size, head_size: tokens per page and D.
    """

    block_size: int
    head_size: int
    key_index: torch.Tensor | None = None
    value_index: torch.Tensor | None = None


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
    num, window, num_q_heads, head_size = queries.shape
    num_kv_heads, length = keys.shape[1:3]
    group = num_q_heads // num_kv_heads
    rows = (queries.float() * scale).view(num, window, num_kv_heads, group, head_size)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(num, num_kv_heads, group * window, head_size)
    logits = torch.matmul(rows, keys.float().transpose(2, 3))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(num, num_kv_heads, group, window, length)
    position = torch.arange(length, device=keys.device)
    query_pos = prompt_lens[:, None] - window + position[:window]  # [N, W]
    hidden = position > query_pos[:, :, None]  # [N, W, T]; stale keys at t >= P, even NaN, go too
    probs = logits.masked_fill_(hidden[:, None, None], float("-inf")).softmax(-1)
    last = probs[:, :, :, -1]
    if reduction == "mean":
        mean, last = probs.mean((2, 3)), last.mean(2)
    else:
        mean, last = probs.mean(3).amax(2), last.amax(2)
    outside = (position >= prompt_lens[:, None] - window)[:, None]
    return mean.masked_fill(outside, 0.0), last.masked_fill(outside, 0.0)


def pool_prefix(
    scores: torch.Tensor, num_scored: torch.Tensor, kernel: int, kind: str = "avg"
) -> torch.Tensor:
    """Pooling over the scored prefix, stride 1, same length.

    "avg" divides by ``kernel`` everywhere: positions outside the prefix count as zeros. "max"
    ignores them. Columns t >= n come back as 0.

    Args:
        scores: [N, Hkv, T] float32.
        num_scored: [N] int64, n.
    """
    if kernel == 1:
        return scores
    outside = (torch.arange(scores.shape[2], device=scores.device) >= num_scored[:, None])[:, None]
    if kind == "avg":
        x = scores.masked_fill(outside, 0.0)
        pooled = F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    else:
        x = scores.masked_fill(outside, float("-inf"))
        pooled = F.max_pool1d(x, kernel, stride=1, padding=kernel // 2)
    return pooled.masked_fill(outside, 0.0)


def calibrate(
    base: torch.Tensor,
    evidence: torch.Tensor,
    trace: list[torch.Tensor],
    num_scored: torch.Tensor,
    capacity: torch.Tensor,
    *,
    mode: str,
    local_k: int,
    lambda_c: float,
    topk_frac: float,
) -> torch.Tensor:
    """BACON's calibrated score S = B + lambda * V.

    Args:
        base: B [N, Hkv, T] float32, 0 at t >= n.
        evidence: E = max(Q - B, 0), same shape.
        trace: evidence of previous layers, same shape each; may be empty.
        num_scored: [N] int64, n.
        capacity: [N] int64, nominal scored tokens per head.
        mode: "e", "el", "elt" or "rel".

    Returns:
        [N, Hkv, T] float32, meaningless at t >= n.
    """
    value = evidence
    if mode != "e":
        coherence = pool_prefix(evidence, num_scored, local_k)
        if mode == "rel":
            neighbours = pool_prefix(base, num_scored, local_k)
            coherence = coherence * neighbours / (neighbours + base + _EPS)
        value = value + coherence
    if mode in ("elt", "rel") and trace:
        layers = torch.stack(trace)
        persistence = layers.mean(0)
        if mode == "rel":
            persistence = (persistence - layers.std(0, correction=0)).clamp_min(0)
        value = value + persistence
    top = (topk_frac * capacity.double()).long().clamp_min(1).minimum(num_scored)
    base_mean, base_std = _top_statistics(base, num_scored, top)
    value_mean, value_std = _top_statistics(value, num_scored, top)
    strength = lambda_c * base_std / (value_std + _EPS)
    if mode == "elt":
        strength = strength * (value_mean / (base_mean + _EPS)).clamp(0, 1)
    return base + strength[:, :, None] * value


def _top_statistics(
    scores: torch.Tensor, num_scored: torch.Tensor, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population deviation of the ``top`` [N] largest of each head's prefix.

    Returns:
        [N, Hkv] each.
    """
    position = torch.arange(scores.shape[2], device=scores.device)
    ranked = scores.masked_fill((position >= num_scored[:, None])[:, None], float("-inf"))
    ranked = ranked.sort(dim=2, descending=True).values
    count = top[:, None, None]
    outside = position >= count
    mean = ranked.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    square = (ranked - mean).square().masked_fill(outside, 0.0).sum(2) / top[:, None]
    return mean[..., 0], square.sqrt()


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    num_candidates: torch.Tensor,
    pinned_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """Exact top-k of every head, in ascending position.

    Candidates are positions [0, num_candidates); [num_candidates, pinned_end) is always kept and
    counts. Larger scores first, ties by lower position; NaN ranks below -inf.

    Args:
        scores: [N, Hkv, T] float32.
        count: [N, Hkv] int64, positions to keep, pinned ones included.
        num_candidates, pinned_end: [N] int64.
        max_count: at least ``count.max()``, known to the host.

    Returns:
        [N, Hkv, max_count] int64; entries beyond ``count`` are T (out of range).
    """
    length = scores.shape[2]
    position = torch.arange(length, device=scores.device)
    bits = (scores + 0.0).view(torch.int32)  # +0.0: both zeros rank alike
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # order-preserving
    key = key.masked_fill(scores.isnan(), -(1 << 31))
    candidate = position < num_candidates[:, None]
    pinned = ~candidate & (position < pinned_end[:, None])
    key = key.masked_fill(pinned[:, None], 1 << 31)
    key = key.masked_fill(~(candidate | pinned)[:, None], -(1 << 32))
    ranked = key.argsort(dim=2, descending=True, stable=True)[:, :, :max_count]
    rank = torch.arange(ranked.shape[2], device=scores.device)
    return ranked.masked_fill(rank >= count[:, :, None], length).sort(dim=2).values


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """Keys or values of whole prompts in token order.

    Args:
        part: "key" or "value".

    Returns:
        [N, Hkv, B * block_size, D].
    """
    pages, block_table, num_kv_heads, layout = prompts
    num, num_blocks = block_table.shape
    heads = torch.arange(num_kv_heads, device=pages.device)
    page = block_table[:, None, :] * num_kv_heads + heads[:, None]  # [N, Hkv, B]
    rows = pages[page]  # [N, Hkv, B, block_size * 2 * D]
    size, head_size = layout.block_size, layout.head_size
    index = layout.key_index if part == "key" else layout.value_index
    if index is not None:
        rows = rows.index_select(3, index)
    else:
        rows = rows.unflatten(3, (size, 2, head_size))[..., 0 if part == "key" else 1, :]
    return rows.reshape(num, num_kv_heads, num_blocks * size, head_size)


def compact_pages(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
) -> None:
    """Copy the kept tokens, in order, into the head pages of the kept blocks. In place.

    The n kept blocks offer a row of n * Hkv pages: number i is block i % n of them, head i // n.
    Head h owns numbers [page_start, page_start + page_count). Sources and targets overlap;
    everything is read before anything is written. Elements move as they are, whatever their type.

    Args:
        prompts: whose pages are rewritten.
        kept: [N, Hkv, K] int64 positions, ascending, K a multiple of block_size; entries beyond
            page_count * block_size go to page 0, which belongs to a block that nobody reads (vLLM's
            null block): cheaper than asking the host which of them there are.
        page_count, page_start: [N, Hkv] int64.
        num_full_blocks, num_kept_blocks: [N] int64, m and n.
    """
    pages, block_table, _, layout = prompts
    num, num_heads, max_kept = kept.shape
    size, head_size = layout.block_size, layout.head_size
    device = pages.device
    last = block_table.shape[1] - 1
    block = (kept // size).clamp(max=last)
    head = torch.arange(num_heads, device=device)[:, None]
    source = block_table.gather(1, block.view(num, -1)).view_as(kept) * num_heads + head

    key_index, value_index = _index_tables(layout, device)
    token = kept % size
    element = torch.cat([key_index[token], value_index[token]], dim=-1)  # [N, Hkv, K, 2 * D]
    staged = pages[source[..., None], element]

    number = page_start[:, :, None] + torch.arange(
        max_kept // size, device=device
    )  # [N, Hkv, pages]
    kept_blocks = num_kept_blocks[:, None, None]
    target_block = num_full_blocks[:, None, None] - kept_blocks + number % kept_blocks
    target_head = number // kept_blocks
    target_block = target_block.clamp(0, last)
    target = (
        block_table.gather(1, target_block.view(num, -1)).view_as(number) * num_heads + target_head
    )
    owned = torch.arange(max_kept // size, device=device) < page_count[:, :, None]
    target = target.masked_fill(~owned, 0)
    element = torch.cat([key_index, value_index], dim=-1)  # [block_size, 2 * D]
    pages[target[..., None, None], element] = staged.view(*target.shape, size, 2 * head_size)


def _index_tables(layout: PageLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Element offsets of (token, d) for keys and for values, [block_size, D] each."""
    size, head_size = layout.block_size, layout.head_size
    if layout.key_index is not None and layout.value_index is not None:
        return layout.key_index.view(size, head_size), layout.value_index.view(size, head_size)
    index = torch.arange(size * 2 * head_size, device=device).view(size, 2, head_size)
    return index[:, 0], index[:, 1]


def head_page_tables(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    block_size: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page table and length of each (request, KV head) as a sequence of its own.

        [ the head's compacted pages | tail page | decode pages ... ]

    An uncompressed request has num_full_blocks 0, num_kept_blocks 1 and page_count 0: its table is
    the natural one.

    Args:
        block_table: [R, B] int32.
        seq_lens: [R] int32, logical length.
        num_full_blocks, num_kept_blocks: [R] int32, m and n.
        page_count, page_start: [R, Hkv] int32, as in :func:`compact_pages`.
        width: pages per row of the result.

    Returns:
        Tables [R * Hkv, width] int32, page ids of one layer; entries past the length are valid ids.
        Lengths kv_len [R * Hkv] int32.
    """
    num, num_heads = page_count.shape
    last = block_table.shape[1] - 1
    index = torch.arange(width, dtype=torch.int32, device=block_table.device)
    count = page_count[:, :, None]
    m, n = num_full_blocks[:, None, None], num_kept_blocks[:, None, None]
    number = page_start[:, :, None] + index  # [R, Hkv, width]
    compacted = index < count
    block = torch.where(compacted, m - n + number % n, m + index - count).clamp_(0, last)
    own_head = torch.arange(num_heads, dtype=torch.int32, device=block_table.device)[:, None]
    head = torch.where(compacted, number // n, own_head)
    table = block_table.gather(1, block.view(num, -1).long()).view_as(block) * num_heads + head
    kv_len = seq_lens[:, None] + (page_count - num_full_blocks[:, None]) * block_size
    return table.view(num * num_heads, width), kv_len.clamp_(min=0).view(num * num_heads)
