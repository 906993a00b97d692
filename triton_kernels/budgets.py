# SPDX-License-Identifier: Apache-2.0
"""Apportionment by bisection: what is dealt out and who gets the rest follow from counts.

One program per row of shares, all of them in its registers; nothing is sorted.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _apportion_kernel(
    shares_ptr,  # [N, X] float64
    total_ptr,  # [N] int64
    low_ptr,  # [N] int64
    high_ptr,  # [N] int64
    counts_ptr,  # [N, X] int64
    count,  # X
    BLOCK: tl.constexpr,
):
    """Floors of shares, and what is missing or too much dealt out in the order of fractions."""
    i_row = tl.program_id(0).to(tl.int64)
    o_x = tl.arange(0, BLOCK)
    m_x = o_x < count
    low, high = tl.load(low_ptr + i_row), tl.load(high_ptr + i_row)
    b_share = tl.load(shares_ptr + i_row * count + o_x, mask=m_x, other=0.0)
    b_share = tl.minimum(tl.maximum(b_share, low.to(tl.float64)), high.to(tl.float64))
    b_floor = tl.floor(b_share + 1e-12)
    # rounded half to even, by an addition that leaves no place for fractions
    b_fraction = (b_share - b_floor) * 1e9 + 4503599627370496.0 - 4503599627370496.0
    b_count = tl.where(m_x, b_floor.to(tl.int64), 0)
    rest = tl.minimum(tl.maximum(tl.load(total_ptr + i_row), count * low), count * high)
    rest -= tl.sum(b_count, 0)

    # a surplus is taken back in the opposite order
    gives = rest >= 0
    cards = tl.abs(rest)
    b_room = tl.where(m_x, tl.where(gives, high - b_count, b_count - low), 0)
    b_rank = b_fraction.to(tl.int64)
    b_rank = tl.where(gives, b_rank, 1000000000 - b_rank)

    # most full rounds that the cards pay for
    most = tl.max(b_room, 0)
    rounds = tl.zeros_like(most)
    step = tl.full((), 1 << 30, tl.int64)
    for _ in range(31):
        wanted = rounds + step
        paid = tl.sum(tl.minimum(b_room, wanted), 0) <= cards
        rounds = tl.where(paid & (wanted <= most), wanted, rounds)
        step >>= 1
    b_dealt = tl.minimum(b_room, rounds)
    cards -= tl.sum(b_dealt, 0)

    # the least rank whose entries can all get one more; of the next one's, the first
    b_open = m_x & (b_room > b_dealt)
    least = tl.full((), 0, tl.int64)
    step = tl.full((), 1 << 30, tl.int64)
    for _ in range(31):
        wanted = least + step
        too_many = tl.sum((b_open & (b_rank >= wanted)).to(tl.int64), 0) >= cards
        least = tl.where(too_many, wanted, least)
        step >>= 1
    b_first = b_open & (b_rank > least)
    b_tied = (b_open & (b_rank == least)).to(tl.int64)
    left = cards - tl.sum(b_first.to(tl.int64), 0)
    b_turn = b_first | ((b_tied != 0) & (tl.cumsum(b_tied, 0) <= left))
    b_dealt += b_turn.to(tl.int64)
    b_count += tl.where(gives, b_dealt, -b_dealt)
    tl.store(counts_ptr + i_row * count + o_x, b_count, mask=m_x)


def apportion(
    shares: torch.Tensor, total: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """See ``reference.apportion``."""
    num, count = shares.shape
    counts = torch.empty((num, count), dtype=torch.int64, device=shares.device)
    block = triton.next_power_of_2(count)
    _apportion_kernel[(num,)](
        shares.contiguous(),
        total.contiguous(),
        low.contiguous(),
        high.contiguous(),
        counts,
        count,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 16,
        enable_fp_fusion=False,  # a product rounded once with a sum would not be the definition's
    )
    return counts
