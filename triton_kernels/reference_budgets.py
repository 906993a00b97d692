# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of how budgets are rounded, a part of ``reference.py``."""

import torch


def apportion(
    shares: torch.Tensor, total: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Round real shares to integers of a given sum, largest remainder first.

    Shares are clipped to [low, high] and floored; a missing rest is handed out one by one in order
    of decreasing fraction (ties: lower index), cyclically, to entries below ``high``; a surplus is
    taken back in order of increasing fraction from entries above ``low``.

    Args:
        shares: [N, H] float64.
        total: [N] int64; clamped to [H * low, H * high].
        low, high: [N] int64 bounds of every entry of a row.

    Returns:
        [N, H] int64 with row sums ``total``.
    """
    count = shares.shape[1]
    low, high = low[:, None].expand_as(shares), high[:, None].expand_as(shares)
    clipped = torch.minimum(torch.maximum(shares, low.double()), high.double())
    floor = torch.floor(clipped + 1e-12)
    fraction = ((clipped - floor) * 1e9).round()  # equal shares tie in spite of float noise
    floor = floor.long()
    rest = torch.minimum(torch.maximum(total, count * low[:, 0]), count * high[:, 0]) - floor.sum(1)
    give = _deal(
        rest.clamp_min(0), high - floor, fraction.argsort(dim=1, descending=True, stable=True)
    )
    take = _deal((-rest).clamp_min(0), floor - low, fraction.argsort(dim=1, stable=True))
    return floor + give - take


def _deal(cards: torch.Tensor, room: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Deal ``cards`` [N] one by one in ``order`` [N, H], cyclically, to entries with ``room`` left.

    Closed form of the loop, without asking the host: after k full rounds entry i holds
    min(k, room_i); k is the largest number of rounds that the cards pay for.
    """
    count = room.shape[1]
    sorted_room = room.sort(1).values
    filled = sorted_room.cumsum(1)  # held by entries 0..j once all of them are full
    still_open = count - 1 - torch.arange(count, device=room.device)
    after = filled + sorted_room * still_open  # cards dealt after sorted_room[j] rounds
    # entries that are full after the last full round
    num_full = (after <= cards[:, None]).sum(1, keepdim=True)
    padded = torch.nn.functional.pad(filled, (1, 0))
    left_open = (count - num_full).clamp_min(1)
    rounds = (cards[:, None] - padded.gather(1, num_full)) // left_open
    rounds = torch.where(num_full < count, rounds, sorted_room[:, -1:])
    dealt = torch.minimum(room, rounds)
    remainder = cards[:, None] - dealt.sum(1, keepdim=True)
    is_open = (room > dealt).gather(1, order)
    turn = is_open & (is_open.cumsum(1) <= remainder)
    return dealt + torch.zeros_like(dealt).scatter(1, order, turn.long())
