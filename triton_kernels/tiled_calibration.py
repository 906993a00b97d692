# SPDX-License-Identifier: Apache-2.0
"""BACON's calibration of heads that no program can hold: a program per tile, seven launches."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix, tiled_radix, token_values
from vllm_kvcompress.kernels.reference_scores import EPS


@triton.jit
def _begin_statistics_kernel(
    num_candidates_ptr,  # [R] int64
    capacity_ptr,  # [R] int64
    scratch_ptr,  # of 2 * R * H rows: B of all heads, then V
    num_heads,
    num_seqs,  # R * H
    TOPK_FRAC: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    i_row = i_part % num_seqs // num_heads
    num_candidates, top = token_values.limits(num_candidates_ptr, capacity_ptr, i_row, TOPK_FRAC)
    tiled_radix.begin(tiled_radix.scratch_row(scratch_ptr, i_part), num_candidates, top)


@triton.jit
def _moments_kernel(
    base_ptr,  # [R * H, T] float32
    value_ptr,  # [R * H, T] float32
    num_candidates_ptr,  # [R] int64
    scratch_ptr,  # of 2 * R * H rows
    moments_ptr,  # [2 * R * H, tiles, 3] float32
    num_heads,
    num_seqs,  # R * H
    length,  # T
    num_tiles,
    BLOCK: tl.constexpr,
):
    """Entries of one tile above the threshold: number, sum, squared distances to their mean."""
    i_part = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    num_candidates = tl.load(num_candidates_ptr + i_part % num_seqs // num_heads).to(tl.int32)
    last_key, _ = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_part))
    o_t = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < num_candidates
    if i_part < num_seqs:
        b_x = tl.load(base_ptr + i_part * length + o_t, mask=m_t, other=0.0)
    else:
        b_x = tl.load(value_ptr + (i_part - num_seqs) * length + o_t, mask=m_t, other=0.0)
    m_t = m_t & (radix.order_keys(b_x) > last_key)
    number = tl.sum(m_t.to(tl.float32), 0)
    total = tl.sum(tl.where(m_t, b_x, 0.0), 0)
    b_off = tl.where(m_t, b_x - total / tl.maximum(number, 1.0), 0.0)
    p_tile = moments_ptr + (i_part * num_tiles + i_tile) * 3
    tl.store(p_tile, number)
    tl.store(p_tile + 1, total)
    tl.store(p_tile + 2, tl.sum(b_off * b_off, 0))


@triton.jit
def _merged_statistics(moments_ptr, scratch_ptr, i_part, num_tiles, top):
    """See ``_top_statistics``, from the moments of tiles: nothing large is subtracted."""
    last_key, rest = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_part))
    tie = radix.value_of(last_key)
    p_moments = moments_ptr + i_part * num_tiles * 3
    total = rest * tie
    for start in range(0, num_tiles, 128):
        o_tile = start + tl.arange(0, 128)
        total += tl.sum(tl.load(p_moments + o_tile * 3 + 1, mask=o_tile < num_tiles, other=0.0), 0)
    mean = total / top
    square = rest * (tie - mean) * (tie - mean)
    for start in range(0, num_tiles, 128):
        o_tile = start + tl.arange(0, 128)
        m_tile = o_tile < num_tiles
        b_number = tl.load(p_moments + o_tile * 3, mask=m_tile, other=0.0)
        b_total = tl.load(p_moments + o_tile * 3 + 1, mask=m_tile, other=0.0)
        b_within = tl.load(p_moments + o_tile * 3 + 2, mask=m_tile, other=0.0)
        b_off = b_total / tl.maximum(b_number, 1.0) - mean
        square += tl.sum(b_within + b_number * b_off * b_off, 0)
    return mean, tl.sqrt(square / top)


@triton.jit
def _add_values_kernel(
    base_ptr,  # [R * H, T] float32
    value_ptr,  # [R * H, T] float32; V goes in, S comes out
    num_candidates_ptr,  # [R] int64
    capacity_ptr,  # [R] int64
    scratch_ptr,  # of 2 * R * H rows
    moments_ptr,  # [2 * R * H, tiles, 3] float32
    num_heads,
    num_seqs,  # R * H
    length,  # T
    num_tiles,
    lambda_c,
    TOPK_FRAC: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of what ``_calibrate_kernel`` does; the strength is the same in all of a head."""
    i_seq = tl.program_id(0).to(tl.int64)
    num_candidates, top = token_values.limits(
        num_candidates_ptr, capacity_ptr, i_seq // num_heads, TOPK_FRAC
    )
    base_mean, base_std = _merged_statistics(moments_ptr, scratch_ptr, i_seq, num_tiles, top)
    value_mean, value_std = _merged_statistics(
        moments_ptr, scratch_ptr, num_seqs + i_seq, num_tiles, top
    )
    strength = token_values.strength(
        base_mean, base_std, value_mean, value_std, lambda_c, GATED, EPS
    )
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_base, p_value = base_ptr + i_seq * length, value_ptr + i_seq * length
    m_t = o_t < num_candidates
    b_base = tl.load(p_base + o_t, mask=m_t, other=0.0)
    b_value = tl.load(p_value + o_t, mask=m_t, other=0.0)
    b_final = tl.where(m_t, b_base + strength * b_value, float("-inf"))
    tl.store(p_value + o_t, b_final, mask=o_t < length)


def calibrate(
    base: torch.Tensor,
    final: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
    lambda_c: float,
    topk_frac: float,
    gated: bool,
) -> None:
    """What ``calibration._calibrate_kernel`` does: ``final`` [R, H, T] is V and becomes S.

    Args:
        limits: num_candidates and capacity, [R] int64.
    """
    num, num_heads, length = final.shape
    rows, tiles = num * num_heads, tiled_radix.num_tiles(length)
    scratch = tiled_radix.new_scratch(2 * rows, base.device)
    moments = torch.empty((2 * rows, tiles, 3), dtype=torch.float32, device=base.device)
    sizes = {"BLOCK": tiled_radix.TILE, "num_warps": tiled_radix.NUM_WARPS}
    _begin_statistics_kernel[(2 * rows,)](*limits, scratch, num_heads, rows, TOPK_FRAC=topk_frac)
    tiled_radix.find_thresholds(base.view(rows, length), scratch, others=final.view(rows, length))
    _moments_kernel[(2 * rows, tiles)](
        base, final, limits[0], scratch, moments, num_heads, rows, length, tiles, **sizes
    )
    _add_values_kernel[(rows, tiles)](
        base, final, *limits, scratch, moments, num_heads, rows, length, tiles, lambda_c,
        TOPK_FRAC=topk_frac, GATED=gated, EPS=EPS, **sizes,
    )  # fmt: skip
