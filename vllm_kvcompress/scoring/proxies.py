# SPDX-License-Identifier: Apache-2.0
"""Hidden states that stand for tokens not decoded yet."""

import functools

import torch

from vllm_kvcompress.scoring.base import HiddenMoments


def mean_and_deviation(
    hidden: HiddenMoments, per_feature: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample deviation of the prompt's hidden states.

    Returns:
        [R, d] float32 each, or [R, 1] over tokens and features together.
    """
    count = hidden.num_tokens.double()[:, None]
    # float64: the difference of two large sums
    total, square = hidden.total.double(), hidden.square.double()
    if not per_feature:
        count = count * total.shape[1]
        total, square = total.sum(1, keepdim=True), square.sum(1, keepdim=True)
    mean = total / count
    variance = (square - total * mean) / (count - 1).clamp_min(1)
    return mean.float(), variance.clamp_min(0).sqrt().float()


@functools.cache
def standard_normal(
    seed: int, layer: int, rows: int, size: int, device: torch.device
) -> torch.Tensor:
    """Noise [rows, size] float32 of one layer, the same wherever it is drawn.

    Drawn on the host, whose generator does not differ between machines, and kept on the device.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * layer)
    return torch.randn(rows, size, generator=generator).to(device)
