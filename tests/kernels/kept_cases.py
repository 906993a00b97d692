# SPDX-License-Identifier: Apache-2.0
"""Kept tokens of several prompts in two layers that share their pages."""

from typing import NamedTuple

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages

HEADS = 3
NUM_BLOCKS = 100
LAYER_PAGES = NUM_BLOCKS * HEADS
COUNTS = [
    # by layer: pages of the heads of each prompt
    [[1, 2, 3], [3, 3, 3], [0, 14, 1]],
    [[0, 5, 1], [3, 3, 3], [2, 0, 13]],
]
"""They fill the kept blocks of both layers together exactly."""


class Kept(NamedTuple):
    """What ``stage_tokens`` and ``write_pages`` take.

    Attributes:
        prompts: with block tables [N, B] of the prompts; ``rows``: the same of their rows.
        kept: [R, H, K] int64; ``count``, ``start``: [R, H] int64.
        staged: [N, pages, block_size * 2 * D], random, one page more than the longest has.
        numbers: num_pages, num_full_blocks and num_kept_blocks.
    """

    prompts: PromptPages
    rows: PromptPages
    kept: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    staged: torch.Tensor
    numbers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def kept_tokens(layout: PageLayout, dtype: torch.dtype) -> Kept:
    """Three prompts, the second of which keeps everything; block 0 is nobody's."""
    generator = torch.Generator().manual_seed(layout.block_size)
    size, width = layout.block_size, 2 * layout.block_size * layout.head_size
    num_full, num_kept = torch.tensor([9, 3, 30]), torch.tensor([2, 3, 5])
    blocks = torch.randperm(NUM_BLOCKS - 1, generator=generator)[:90].view(3, 30) + 1

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 200, shape, generator=generator).to(dtype)

    pages = draw(2 * LAYER_PAGES, width)
    count = torch.tensor(COUNTS)  # [L, N, H]
    of_prompt = count.transpose(0, 1).flatten(1)
    start = (of_prompt.cumsum(1) - of_prompt).view(3, 2, HEADS).transpose(0, 1).flatten(0, 1)
    count = count.flatten(0, 1)
    kept = torch.full((6, HEADS, 14 * size), 30 * size)
    for row in range(6):
        for head in range(HEADS):
            order = torch.randperm(int(num_full[row % 3]) * size, generator=generator)
            chosen = order[: int(count[row, head]) * size].sort().values
            kept[row, head, : len(chosen)] = chosen
    prompts = PromptPages(pages, blocks, HEADS, layout)
    shifts = torch.tensor([0, NUM_BLOCKS]).repeat_interleave(3)[:, None]
    rows = prompts._replace(block_table=blocks.repeat(2, 1) + shifts)
    num_pages = of_prompt.sum(1)
    staged = draw(3, int(num_pages.max()) + 1, width)
    return Kept(prompts, rows, kept, count, start, staged, (num_pages, num_full, num_kept))
