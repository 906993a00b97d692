# SPDX-License-Identifier: Apache-2.0
"""Votes of groups by threshold search: the least key of a cover, found two bits at a time.

Keys are the bits of the masses, which sort like them. Each pass over a row adds up the mass at and
above the three keys that begin with the bits found so far and the next two. All sums are of whole
numbers, so neither their order nor the tiling shows in a cover.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference_rows import SHARE_BITS, UNIT_BITS, share_of

_BLOCK, _NUM_WARPS = 4096, 16


@triton.jit
def _load_keys(p_row, o_t, end):
    """uint32 keys of masses, 0 outside."""
    return tl.load(p_row + o_t, mask=o_t < end, other=0.0).to(tl.uint32, bitcast=True)


@triton.jit
def _units(key, top, UNIT_BITS: tl.constexpr):
    """Masses from their keys in units of their row, int64, rounded down; ``top``: largest key."""
    exponent = tl.maximum(key >> 23, 1)
    behind = tl.maximum(top >> 23, 1) - exponent
    number = (key & 0x7FFFFF) | tl.where(key >= 0x800000, 0x800000, 0).to(tl.uint32)
    return (number.to(tl.int64) << (UNIT_BITS - 24)) >> tl.minimum(behind, UNIT_BITS).to(tl.int64)


@triton.jit
def _cover_kernel(
    masses_ptr,  # [N * Hkv * NG, T] float32
    end_ptr,  # [N] int64
    least_ptr,  # [N * Hkv * NG] int64
    tie_end_ptr,  # [N * Hkv * NG] int64
    rows_per_request,  # Hkv * NG
    length,  # T
    share,  # tau in units of 2**-SHARE_BITS
    FLOOR: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    SHARE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A cover: the keys above ``least``, and those that equal it before position ``tie_end``."""
    i_seq = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + i_seq // rows_per_request).to(tl.int32)
    p_row = masses_ptr + i_seq * length
    o_block = tl.arange(0, BLOCK)

    b_top = tl.zeros((BLOCK,), tl.uint32)
    for start in range(0, end, BLOCK):
        b_top = tl.maximum(b_top, _load_keys(p_row, start + o_block, end))
    top = tl.max(b_top, 0)
    b_sum = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, end, BLOCK):
        b_sum += _units(_load_keys(p_row, start + o_block, end), top, UNIT_BITS)
    total = tl.sum(b_sum, 0)

    # mass that a cover first reaches ("min"), or that it may not reach
    high, low = total >> SHARE_BITS, total & ((1 << SHARE_BITS) - 1)
    if FLOOR:
        goal = high * share + (low * share >> SHARE_BITS) + 1
    else:
        goal = high * share + ((low * share + ((1 << SHARE_BITS) - 1)) >> SHARE_BITS)

    # the largest key with the goal at and above it, and the mass above that key
    least = tl.full((), 0, tl.uint32)
    above = tl.full((), 0, tl.int64)
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        b_one = tl.zeros((BLOCK,), tl.int64)
        b_two = tl.zeros((BLOCK,), tl.int64)
        b_three = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, end, BLOCK):
            key = _load_keys(p_row, start + o_block, end)
            mass = _units(key, top, UNIT_BITS)
            b_one += tl.where(key >= least + step, mass, 0)
            b_two += tl.where(key >= least + 2 * step, mass, 0)
            b_three += tl.where(key >= least + 3 * step, mass, 0)
        one, two, three = tl.sum(b_one, 0), tl.sum(b_two, 0), tl.sum(b_three, 0)
        bits = (one >= goal).to(tl.uint32) + (two >= goal).to(tl.uint32)
        bits += (three >= goal).to(tl.uint32)
        above = tl.where(
            one < goal, one, tl.where(two < goal, two, tl.where(three < goal, three, above))
        )
        least += bits * step
        step >>= 2

    mass = _units(least, top, UNIT_BITS)
    ties = (goal - above + mass - 1) // tl.maximum(mass, 1)
    if FLOOR:
        ties -= 1
    ties = tl.where(total < goal, end, ties)  # then all are covered, and the least key is 0
    tie_end = tl.full((), 0, tl.int32)
    num_ties = tl.full((), 0, tl.int32)
    for start in range(0, end, BLOCK):
        o_t = start + o_block
        tied = (o_t < end) & (_load_keys(p_row, o_t, end) == least)
        number = num_ties + tl.cumsum(tied.to(tl.int32), 0)  # 1 for the first of them
        tie_end = tl.maximum(tie_end, tl.max(tl.where(tied & (number <= ties), o_t + 1, 0), 0))
        num_ties += tl.sum(tied.to(tl.int32), 0)
    tl.store(least_ptr + i_seq, least.to(tl.int64))
    tl.store(tie_end_ptr + i_seq, tie_end.to(tl.int64))


@triton.jit
def _votes_kernel(
    masses_ptr,  # [N * Hkv, NG, T] float32
    end_ptr,  # [N] int64
    least_ptr,  # [N * Hkv, NG] int64
    tie_end_ptr,  # [N * Hkv, NG] int64
    votes_ptr,  # [N * Hkv, T] float32
    num_heads,
    num_groups,
    length,  # T
    BLOCK_T: tl.constexpr,
):
    """How many covers hold each of a tile of tokens."""
    i_seq = tl.program_id(0).to(tl.int64)
    end = tl.load(end_ptr + i_seq // num_heads).to(tl.int32)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_votes = tl.zeros((BLOCK_T,), tl.float32)
    for i_group in range(num_groups):
        i_cover = i_seq * num_groups + i_group
        least, tie_end = tl.load(least_ptr + i_cover), tl.load(tie_end_ptr + i_cover)
        key = _load_keys(masses_ptr + i_cover * length, o_t, end).to(tl.int64)
        b_votes += ((key > least) | ((key == least) & (o_t < tie_end))).to(tl.float32)
    p_votes = votes_ptr + i_seq * length + o_t
    tl.store(p_votes, tl.where(o_t < end, b_votes, 0.0), mask=o_t < length)


def cover_votes(masses: torch.Tensor, end: torch.Tensor, tau: float, cover: str) -> torch.Tensor:
    """See ``reference.cover_votes``.

    One program per group of a head, which reads its masses 19 times, most of them from the L2
    cache; then one per tile of a head's tokens.
    """
    num, num_heads, num_groups, length = masses.shape
    masses, end = masses.contiguous(), end.contiguous()
    covers = torch.empty((2, num * num_heads * num_groups), dtype=torch.int64, device=masses.device)
    _cover_kernel[(num * num_heads * num_groups,)](
        masses, end, covers[0], covers[1], num_heads * num_groups, length, share_of(tau),
        FLOOR=cover == "floor", UNIT_BITS=UNIT_BITS, SHARE_BITS=SHARE_BITS, BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )  # fmt: skip
    votes = torch.empty((num, num_heads, length), dtype=torch.float32, device=masses.device)
    _votes_kernel[(num * num_heads, triton.cdiv(length, 256))](
        masses, end, covers[0], covers[1], votes, num_heads, num_groups, length, BLOCK_T=256
    )
    return votes
