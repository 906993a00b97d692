# SPDX-License-Identifier: Apache-2.0
"""What an allocator decides, and the integer arithmetic all of them share."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Allocator(abc.ABC):
    """Shares a layer's budget out to its KV heads: a frozen dataclass whose fields are its options.

    Class attributes:
        even: every head of every layer gets the nominal capacity, so that one page table serves all
            layers and :meth:`allocate` is never called.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    even: ClassVar[bool]

    @abc.abstractmethod
    def allocate(
        self, base: torch.Tensor, num_scored: torch.Tensor, capacity: torch.Tensor
    ) -> torch.Tensor:
        """Scored tokens each head keeps.

        Args:
            base: [N, Hkv, T] float32 base scores, -inf at t >= n.
            num_scored: [N] int64, n.
            capacity: [N] int64, nominal scored tokens per head; capacity <= n.

        Returns:
            [N, Hkv] int64.
        """


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


def pages_from_tokens(
    tokens: torch.Tensor,
    window: int,
    tail: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    num_full_blocks: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Round scored tokens per head to whole head pages; the layer keeps exactly its n * Hkv pages.

    A head holds its scored tokens and its window in pages, except for the window's tokens that lie
    in the prompt's partial tail block. No head gets fewer pages than its part of the window needs,
    or more than the prompt has.

    Args:
        tokens: [N, Hkv] int64 scored tokens per head.
        tail, num_kept_blocks, num_full_blocks: [N] int64, as in ``PromptPlan``.

    Returns:
        [N, Hkv] int64 pages.
    """
    shares = (tokens + window - tail[:, None]).double() / block_size
    low = (window - tail).clamp_min(0).add(block_size - 1) // block_size
    total = num_kept_blocks * tokens.shape[1]
    return apportion(shares, total, low, num_full_blocks)
