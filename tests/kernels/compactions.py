# SPDX-License-Identifier: Apache-2.0
"""Ragged compactions of several requests, for comparing fast operations with their definitions."""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages

HEADS = 3
NUM_BLOCKS = 100
LAYER_PAGES = NUM_BLOCKS * HEADS
NUM_FULL = torch.tensor([9, 3, 30])  # the second keeps everything
NUM_KEPT = torch.tensor([2, 3, 5])
COUNTS = {
    1: [[1, 2, 3], [3, 3, 3], [0, 14, 1]],
    2: [[1, 2, 3, 0, 5, 1], [3, 4, 3, 3, 1, 4], [0, 14, 1, 2, 0, 13]],
}
"""Pages of the runs of each request, by number of layers; they fill the kept blocks exactly."""


class Runs(NamedTuple):
    """Runs of pages as ``write_pages`` takes them.

    Attributes:
        staged: [N, X, K, 2 * D].
        count, start: [N, X] int64.
    """

    staged: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor


def random_prompts(layout: PageLayout, dtype: torch.dtype, layers: int = 1) -> PromptPages:
    """Three requests in a cache of ``layers`` * LAYER_PAGES pages; block 0 is nobody's."""
    generator = torch.Generator().manual_seed(layout.block_size)
    blocks = torch.randperm(NUM_BLOCKS - 1, generator=generator)[:90].view(3, 30) + 1
    shape = (layers * LAYER_PAGES, 2 * layout.block_size * layout.head_size)
    pages = torch.randint(0, 200, shape, generator=generator).to(dtype)
    return PromptPages(pages, blocks, HEADS, layout)


def random_kept(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending positions [N, Hkv, K], out of range where unused, and their number [N, Hkv]."""
    generator = torch.Generator().manual_seed(size)
    count = torch.tensor(COUNTS[1]) * size
    count[:, 0] = (count[:, 0] - 3).clamp_min(0)  # need not be whole pages
    kept = torch.full((3, HEADS, 14 * size), 30 * size)
    for row in range(3):
        for head in range(HEADS):
            order = torch.randperm(int(NUM_FULL[row]) * size, generator=generator)
            num = int(count[row, head])
            kept[row, head, :num] = order[:num].sort().values
    return kept, count


def random_runs(layout: PageLayout, dtype: torch.dtype, layers: int, in_one: bool) -> Runs:
    """Runs per layer and head, or all pages of a request as one run."""
    count = torch.tensor(COUNTS[layers])
    if in_one:
        count = count.sum(1, keepdim=True)
    shape = (*count.shape, int(count.max()) * layout.block_size, 2 * layout.head_size)
    generator = torch.Generator().manual_seed(layers)
    staged = torch.randint(0, 200, shape, generator=generator).to(dtype)
    return Runs(staged, count, count.cumsum(1) - count)
