# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of every head by radix selection: scores are read once, nothing is sorted."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix, tiled_radix


@triton.jit
def _limits(count_ptr, candidates_ptr, protected_end_ptr, i_seq, num_heads):
    """Positions to keep, candidates, end of the protected ones, and candidates to keep: int32."""
    i_row = i_seq // num_heads
    count = tl.load(count_ptr + i_seq).to(tl.int32)
    candidates = tl.load(candidates_ptr + i_row).to(tl.int32)
    protected_end = tl.maximum(tl.load(protected_end_ptr + i_row).to(tl.int32), candidates)
    return count, candidates, protected_end, tl.maximum(count - (protected_end - candidates), 0)


@triton.jit
def _place(
    b_key, p_kept, o_t, num_kept, num_ties, count, candidates, protected_end, last_key, rest
):
    """Write the kept ones among positions ``o_t``, which have keys ``b_key``.

    Args:
        num_kept, num_ties: kept positions, and candidates with the last key, before these.
    """
    m_t = o_t < candidates
    tied = (m_t & (b_key == last_key)).to(tl.int32)
    among_ties = num_ties + tl.cumsum(tied, 0)  # 1 for the first of them
    keep = m_t & ((b_key > last_key) | ((tied != 0) & (among_ties <= rest)))
    keep = (keep | ((o_t >= candidates) & (o_t < protected_end))).to(tl.int32)
    target = num_kept + tl.cumsum(keep, 0) - 1
    tl.store(p_kept + target, o_t.to(tl.int64), mask=(keep != 0) & (target < count))


@triton.jit
def _load_keys(p_row, o_t, end):
    """Order keys of the scores at positions ``o_t``, 0 from ``end`` on."""
    m_t = o_t < end
    return tl.where(m_t, radix.order_keys(tl.load(p_row + o_t, mask=m_t, other=0.0)), 0)


@triton.jit
def _select_kernel(
    scores_ptr,  # [R * H, T] float32
    count_ptr,  # [R * H] int64
    candidates_ptr,  # [R] int64
    protected_end_ptr,  # [R] int64
    kept_ptr,  # [R * H, width] int64
    num_heads,
    length,  # T
    width,
    BLOCK: tl.constexpr,
):
    """One head, by one program that holds all of it."""
    i_seq = tl.program_id(0).to(tl.int64)
    count, candidates, protected_end, free = _limits(
        count_ptr, candidates_ptr, protected_end_ptr, i_seq, num_heads
    )
    p_kept = kept_ptr + i_seq * width
    o_t = tl.arange(0, BLOCK)
    b_key = _load_keys(scores_ptr + i_seq * length, o_t, candidates)
    last_key, rest = radix.threshold(b_key, free)
    _place(b_key, p_kept, o_t, 0, 0, count, candidates, protected_end, last_key, rest)
    tl.store(p_kept + o_t, tl.cast(length, tl.int64), mask=(o_t >= count) & (o_t < width))


@triton.jit
def _begin_selection_kernel(
    count_ptr,  # [R * H] int64
    candidates_ptr,  # [R] int64
    protected_end_ptr,  # [R] int64
    scratch_ptr,  # of R * H rows
    num_heads,
):
    i_seq = tl.program_id(0).to(tl.int64)
    _, candidates, _, free = _limits(count_ptr, candidates_ptr, protected_end_ptr, i_seq, num_heads)
    tiled_radix.begin(tiled_radix.scratch_row(scratch_ptr, i_seq), candidates, free)


@triton.jit
def _place_kernel(
    scores_ptr,  # [R * H, T] float32
    count_ptr,  # [R * H] int64
    candidates_ptr,  # [R] int64
    protected_end_ptr,  # [R] int64
    scratch_ptr,  # of R * H rows
    tails_ptr,  # of as many parts
    kept_ptr,  # [R * H, width] int64
    num_heads,
    length,  # T
    width,
    num_tiles,
    BLOCK: tl.constexpr,
):
    """One tile of one head. Where its kept positions go follows from counts of the tiles before."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    count, candidates, protected_end, _ = _limits(
        count_ptr, candidates_ptr, protected_end_ptr, i_seq, num_heads
    )
    start = i_tile * BLOCK
    o_t = start + tl.arange(0, BLOCK)
    p_kept = kept_ptr + i_seq * width
    if start < protected_end:
        last_key, rest = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_seq))
        counted = tl.minimum(i_tile, tl.cdiv(candidates, BLOCK))
        above, ties = tiled_radix.tile_counts(tails_ptr, i_seq, num_tiles, counted, last_key)
        num_kept = above + tl.minimum(ties, rest) + tl.maximum(start - candidates, 0)
        b_key = _load_keys(scores_ptr + i_seq * length, o_t, candidates)
        _place(b_key, p_kept, o_t, num_kept, ties, count, candidates, protected_end, last_key, rest)
    tl.store(p_kept + o_t, tl.cast(length, tl.int64), mask=(o_t >= count) & (o_t < width))


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """See ``reference.select_tokens``; many programs per head where heads are long."""
    select = select_by_tile if scores.shape[2] > tiled_radix.LONG else select_by_row
    return select(scores, count, candidate_end, protected_end, max_count)


def select_by_row(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """:func:`select_tokens` in one launch of one program per head."""
    num, num_heads, length = scores.shape
    width = min(max_count, length)
    kept = torch.empty((num, num_heads, width), dtype=torch.int64, device=scores.device)
    _select_kernel[(num * num_heads,)](
        scores.contiguous(),
        count.contiguous(),
        candidate_end.contiguous(),
        protected_end.contiguous(),
        kept,
        num_heads,
        length,
        width,
        **radix.sizes(length),
    )
    return kept


def select_by_tile(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """:func:`select_tokens` in six launches, five of them of one program per tile of a head."""
    num, num_heads, length = scores.shape
    rows, device = num * num_heads, scores.device
    width, tiles = min(max_count, length), tiled_radix.num_tiles(length)
    scores = scores.contiguous()
    limits = (count.contiguous(), candidate_end.contiguous(), protected_end.contiguous())
    kept = torch.empty((num, num_heads, width), dtype=torch.int64, device=device)
    scratch = tiled_radix.new_scratch(rows, device)
    tails = tiled_radix.new_tails(rows, length, device)
    _begin_selection_kernel[(rows,)](*limits, scratch, num_heads)
    tiled_radix.find_thresholds(scores.view(rows, length), scratch, tails)
    _place_kernel[(rows, tiles)](
        scores,
        *limits,
        scratch,
        tails,
        kept,
        num_heads,
        length,
        width,
        tiles,
        BLOCK=tiled_radix.TILE,
        num_warps=tiled_radix.NUM_WARPS,
    )
    return kept
