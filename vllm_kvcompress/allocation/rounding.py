# SPDX-License-Identifier: Apache-2.0
"""The integer arithmetic that all allocators share."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from vllm_kvcompress.kernels import apportion


def apportion_host(
    shares: Sequence[Fraction | float], total: int, low: int, high: int
) -> list[int]:
    """:func:`apportion` of one row, in plain Python, for decisions made before prefill."""
    clipped = [min(max(share, low), high) for share in shares]
    counts = [math.floor(share + 1e-12) for share in clipped]
    fractions = [
        round((share - count) * 10**9) for share, count in zip(clipped, counts, strict=True)
    ]
    rest = min(max(total, len(counts) * low), len(counts) * high) - sum(counts)
    step, bound = (1, high) if rest > 0 else (-1, low)
    order = sorted(range(len(counts)), key=lambda i: (-step * fractions[i], i))
    while rest:
        for i in order:
            if rest and counts[i] != bound:
                counts[i] += step
                rest -= step
    return counts


def pages_from_kept(
    kept: torch.Tensor,
    tail: torch.Tensor,
    num_protected: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    num_full_blocks: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Round kept tokens to whole head pages, so that a group holds exactly n pages per entry.

    The group is whatever shares its pages: the heads of a layer, or those of all layers. No entry
    gets fewer pages than the tokens need that are always kept, or more than the prompt has.

    Args:
        kept: [N, H] int64 kept tokens of each entry, those of the tail block included.
        tail: [N] int64, tokens in the prompt's partial last block.
        num_protected: [N] int64, tokens in full blocks that are always kept.
        num_kept_blocks, num_full_blocks: [N] int64, n and m.

    Returns:
        [N, H] int64 pages.
    """
    shares = (kept - tail[:, None]).double() / block_size
    low = (num_protected + block_size - 1) // block_size
    return apportion(shares, num_kept_blocks * kept.shape[1], low, num_full_blocks)
