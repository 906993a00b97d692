# SPDX-License-Identifier: Apache-2.0
"""Entries of each head among the best of its layer: two radix thresholds instead of two sorts."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix, tiled_radix


@triton.jit
def _masses(b_x, last_key):
    """Scores without NaN and negative ones, float64: all of them, and those above a key."""
    key = radix.order_keys(b_x)
    b_x = tl.where(b_x > 0, b_x, 0.0)
    return b_x.to(tl.float64), tl.where(key > last_key, b_x, 0.0).to(tl.float64)


@triton.jit
def _share(mass, above, last_key, rest):
    """Share of a head's mass that its top holds; ``rest`` entries of it have the last key."""
    top = above + rest * tl.maximum(radix.value_of(last_key), 0.0).to(tl.float64)
    # a head without mass, or with an infinite one, has nothing to scale
    has_share = (mass > 0) & (mass < float("inf"))
    share = top / tl.where(has_share, mass, 1.0)
    return tl.where(has_share, share, 1.0).to(tl.float32)


@triton.jit
def _store_scaled(p_base, p_scaled, o_t, length, factor):
    """Scores at positions ``o_t`` times a factor; -inf for NaN."""
    m_t = o_t < length
    b_x = tl.load(p_base + o_t, mask=m_t, other=0.0)
    tl.store(p_scaled + o_t, tl.where(b_x != b_x, float("-inf"), b_x * factor), mask=m_t)


@triton.jit
def _scale_kernel(
    base_ptr,  # [R * H, T] float32
    capacity_ptr,  # [R] int64
    scaled_ptr,  # [R * H, T] float32
    num_heads,
    length,  # T
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head's scores, times the share of its mass that its top holds; -inf for NaN."""
    i_seq = tl.program_id(0).to(tl.int64)
    p_base, p_scaled = base_ptr + i_seq * length, scaled_ptr + i_seq * length
    o_t = tl.arange(0, BLOCK)
    factor = tl.full((), 1.0, tl.float32)
    if NORMALIZE:
        top = tl.load(capacity_ptr + i_seq // num_heads).to(tl.int32)
        m_t = o_t < length
        b_x = tl.load(p_base + o_t, mask=m_t, other=float("-inf"))
        last_key, rest = radix.threshold(tl.where(m_t, radix.order_keys(b_x), 0), top)
        b_mass, b_above = _masses(b_x, last_key)
        factor = _share(tl.sum(b_mass, 0), tl.sum(b_above, 0), last_key, rest)
    _store_scaled(p_base, p_scaled, o_t, length, factor)


@triton.jit
def _count_kernel(
    scaled_ptr,  # [R, H * T] float32
    capacity_ptr,  # [R] int64
    counts_ptr,  # [R, H] int64
    num_heads,
    length,  # T
    BLOCK: tl.constexpr,
):
    """Entries of each head of one row above the threshold of all its heads together."""
    i_row = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < num_heads * length
    b_x = tl.load(scaled_ptr + i_row * num_heads * length + o_x, mask=m_x, other=0.0)
    b_key = tl.where(m_x, radix.order_keys(b_x), 0)
    capacity = tl.load(capacity_ptr + i_row).to(tl.int32)
    last_key, rest = radix.threshold(b_key, num_heads * capacity)
    for i_head in range(num_heads):
        m_head = (o_x >= i_head * length) & (o_x < (i_head + 1) * length)
        tied = tl.sum((m_head & (b_key == last_key)).to(tl.int32), 0)
        taken = tl.minimum(tied, rest)  # lower heads take first
        rest -= taken
        count = tl.sum((m_head & (b_key > last_key)).to(tl.int32), 0) + taken
        tl.store(counts_ptr + i_row * num_heads + i_head, count.to(tl.int64))


@triton.jit
def _begin_heads_kernel(
    capacity_ptr,  # [R] int64
    scratch_ptr,  # of sequences that have ``parts`` heads each
    per_row,  # sequences of a row
    parts,
    length,  # T
):
    i_row = tl.program_id(0).to(tl.int64)
    count = tl.load(capacity_ptr + i_row // per_row) * parts
    tiled_radix.begin(tiled_radix.scratch_row(scratch_ptr, i_row), length, count)


@triton.jit
def _tile_masses_kernel(
    base_ptr,  # [R * H, T] float32
    scratch_ptr,  # of R * H rows
    masses_ptr,  # [R * H, tiles, 2] float64
    length,  # T
    num_tiles,
    BLOCK: tl.constexpr,
):
    """Mass of one tile of a head, and of its entries above the head's threshold."""
    i_seq = tl.program_id(0).to(tl.int64)
    last_key, _ = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_seq))
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(base_ptr + i_seq * length + o_t, mask=o_t < length, other=float("-inf"))
    b_mass, b_above = _masses(b_x, last_key)
    p_tile = masses_ptr + (i_seq * num_tiles + tl.program_id(1)) * 2
    tl.store(p_tile, tl.sum(b_mass, 0))
    tl.store(p_tile + 1, tl.sum(b_above, 0))


@triton.jit
def _scale_tile_kernel(
    base_ptr,  # [R * H, T] float32
    scratch_ptr,  # of R * H rows
    masses_ptr,  # [R * H, tiles, 2] float64
    scaled_ptr,  # [R * H, T] float32
    length,  # T
    num_tiles,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of what ``_scale_kernel`` does."""
    i_seq = tl.program_id(0).to(tl.int64)
    factor = tl.full((), 1.0, tl.float32)
    if NORMALIZE:
        last_key, rest = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_seq))
        p_masses = masses_ptr + i_seq * num_tiles * 2
        mass = tl.full((), 0.0, tl.float64)
        above = tl.full((), 0.0, tl.float64)
        for start in range(0, num_tiles, 128):
            o_tile = start + tl.arange(0, 128)
            m_tile = o_tile < num_tiles
            mass += tl.sum(tl.load(p_masses + o_tile * 2, mask=m_tile, other=0.0), 0)
            above += tl.sum(tl.load(p_masses + o_tile * 2 + 1, mask=m_tile, other=0.0), 0)
        factor = _share(mass, above, last_key, rest)
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _store_scaled(base_ptr + i_seq * length, scaled_ptr + i_seq * length, o_t, length, factor)


@triton.jit
def _count_tiles_kernel(
    scratch_ptr,  # of R rows
    tails_ptr,  # of R * H parts
    counts_ptr,  # [R, H] int64
    num_heads,
    num_tiles,
):
    """What ``_count_kernel`` writes, from the counts of tiles."""
    i_row = tl.program_id(0).to(tl.int64)
    last_key, rest = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_row))
    for i_head in range(num_heads):
        i_seq = i_row * num_heads + i_head
        above, tied = tiled_radix.tile_counts(tails_ptr, i_seq, num_tiles, num_tiles, last_key)
        taken = tl.minimum(tied, rest)  # lower heads take first
        rest -= taken
        tl.store(counts_ptr + i_seq, (above + taken).to(tl.int64))


def head_counts(base: torch.Tensor, capacity: torch.Tensor, normalize: bool) -> torch.Tensor:
    """See ``reference.head_counts``.

    One program per head reads its scores twice and writes them once. Then one program per row reads
    them; where the heads of a row do not fit into one, tiles do in six launches, the last of which
    reads counts only. Where heads are long, tiles do all of it, in thirteen launches, seven when
    nothing is normalised.
    """
    num, num_heads, length = base.shape
    rows, device = num * num_heads, base.device
    base, capacity = base.contiguous(), capacity.contiguous()
    scaled = torch.empty_like(base)
    counts = torch.empty((num, num_heads), dtype=torch.int64, device=device)
    tiles = tiled_radix.num_tiles(length)
    if length <= tiled_radix.LONG:
        _scale_kernel[(rows,)](
            base, capacity, scaled, num_heads, length, NORMALIZE=normalize, **radix.sizes(length)
        )
    else:
        _scale_by_tile(base, capacity, scaled, normalize)
    if num_heads * length <= tiled_radix.LONG:
        _count_kernel[(num,)](
            scaled, capacity, counts, num_heads, length, **radix.sizes(num_heads * length)
        )
        return counts
    scratch = tiled_radix.new_scratch(num, device)
    tails = tiled_radix.new_tails(rows, length, device)
    _begin_heads_kernel[(num,)](capacity, scratch, 1, num_heads, length)
    tiled_radix.find_thresholds(scaled.view(rows, length), scratch, tails)
    _count_tiles_kernel[(num,)](scratch, tails, counts, num_heads, tiles)
    return counts


def _scale_by_tile(
    base: torch.Tensor, capacity: torch.Tensor, scaled: torch.Tensor, normalize: bool
) -> None:
    """What ``_scale_kernel`` does, of heads that are too long for it."""
    num, num_heads, length = base.shape
    rows, tiles = num * num_heads, tiled_radix.num_tiles(length)
    sizes = {"BLOCK": tiled_radix.TILE, "num_warps": tiled_radix.NUM_WARPS}
    scratch = tiled_radix.new_scratch(rows, base.device)
    masses = torch.empty((rows, tiles, 2), dtype=torch.float64, device=base.device)
    if normalize:
        _begin_heads_kernel[(rows,)](capacity, scratch, num_heads, 1, length)
        tiled_radix.find_thresholds(base.view(rows, length), scratch)
        _tile_masses_kernel[(rows, tiles)](base, scratch, masses, length, tiles, **sizes)
    _scale_tile_kernel[(rows, tiles)](
        base, scratch, masses, scaled, length, tiles, NORMALIZE=normalize, **sizes
    )
