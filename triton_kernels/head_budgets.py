# SPDX-License-Identifier: Apache-2.0
"""Entries of each head among the best of its layer: two radix thresholds instead of two sorts."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix


@triton.jit
def _scale_kernel(
    base_ptr,  # [N * H, T] float32
    capacity_ptr,  # [N] int64
    scaled_ptr,  # [N * H, T] float32
    num_heads,
    length,  # T
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head's scores, times the share of its mass that its top holds; -inf for NaN."""
    i_seq = tl.program_id(0).to(tl.int64)
    p_base, p_scaled = base_ptr + i_seq * length, scaled_ptr + i_seq * length
    o_block = tl.arange(0, BLOCK)
    factor = tl.full((), 1.0, tl.float32)
    if NORMALIZE:
        top = tl.load(capacity_ptr + i_seq // num_heads).to(tl.int32)
        last_key, rest = radix.threshold(p_base, length, top, BLOCK)
        b_mass = tl.zeros((BLOCK,), tl.float64)
        b_top = tl.zeros((BLOCK,), tl.float64)
        b_tie = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            o_t = start + o_block
            b_x = tl.load(p_base + o_t, mask=o_t < length, other=float("-inf"))
            key = radix.order_keys(b_x)
            b_x = tl.where(b_x > 0, b_x, 0.0)
            b_mass += b_x.to(tl.float64)
            b_top += tl.where(key > last_key, b_x, 0.0).to(tl.float64)
            b_tie = tl.where(key == last_key, b_x, b_tie)
        mass = tl.sum(b_mass, 0)
        top_mass = tl.sum(b_top, 0) + rest * tl.max(b_tie, 0).to(tl.float64)
        # a head without mass, or with an infinite one, has nothing to scale
        has_share = (mass > 0) & (mass < float("inf"))
        share = top_mass / tl.where(has_share, mass, 1.0)
        factor = tl.where(has_share, share, 1.0).to(tl.float32)
    for start in range(0, length, BLOCK):
        o_t = start + o_block
        b_x = tl.load(p_base + o_t, mask=o_t < length, other=0.0)
        b_x = tl.where(b_x != b_x, float("-inf"), b_x * factor)
        tl.store(p_scaled + o_t, b_x, mask=o_t < length)


@triton.jit
def _count_kernel(
    scaled_ptr,  # [N, H * T] float32
    capacity_ptr,  # [N] int64
    counts_ptr,  # [N, H] int64
    num_heads,
    length,  # T
    BLOCK: tl.constexpr,
):
    """Entries of each head of one request above the threshold of all its heads together."""
    i_row = tl.program_id(0).to(tl.int64)
    o_block = tl.arange(0, BLOCK)
    p_row = scaled_ptr + i_row * num_heads * length
    capacity = tl.load(capacity_ptr + i_row).to(tl.int32)
    last_key, rest = radix.threshold(p_row, num_heads * length, num_heads * capacity, BLOCK)
    for i_head in range(num_heads):
        b_above = tl.zeros((BLOCK,), tl.int32)
        b_tied = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, length, BLOCK):
            o_t = start + o_block
            m_t = o_t < length
            key = radix.order_keys(tl.load(p_row + i_head * length + o_t, mask=m_t, other=0.0))
            b_above += (m_t & (key > last_key)).to(tl.int32)
            b_tied += (m_t & (key == last_key)).to(tl.int32)
        taken = tl.minimum(tl.sum(b_tied, 0), rest)  # lower heads take first
        rest -= taken
        count = tl.sum(b_above, 0) + taken
        tl.store(counts_ptr + i_row * num_heads + i_head, count.to(tl.int64))


def head_counts(base: torch.Tensor, capacity: torch.Tensor, normalize: bool) -> torch.Tensor:
    """See ``reference.head_counts``.

    One program per head, then one per request: scores are read six times and written once, then
    read five times.
    """
    num, num_heads, length = base.shape
    base, capacity = base.contiguous(), capacity.contiguous()
    scaled = torch.empty_like(base)
    counts = torch.empty((num, num_heads), dtype=torch.int64, device=base.device)
    sizes = {"BLOCK": radix.BLOCK, "num_warps": radix.NUM_WARPS}
    _scale_kernel[(num * num_heads,)](
        base, capacity, scaled, num_heads, length, NORMALIZE=normalize, **sizes
    )
    _count_kernel[(num,)](scaled, capacity, counts, num_heads, length, **sizes)
    return counts
