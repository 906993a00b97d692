# SPDX-License-Identifier: Apache-2.0
"""Ragged compactions of several prompts, for comparing fast operations with their definitions."""

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages

HEADS = 3
NUM_BLOCKS = 100
LAYER_PAGES = NUM_BLOCKS * HEADS
NUM_FULL = torch.tensor([9, 3, 30])  # the second keeps everything
NUM_KEPT = torch.tensor([2, 3, 5])
COUNTS = {
    1: [[1, 2, 3], [3, 3, 3], [0, 14, 1]],
    2: [[1, 2, 3, 0, 5, 1], [3, 3, 3, 3, 3, 3], [0, 14, 1, 2, 0, 13]],
}
"""Pages of the layers and heads of each prompt; they fill the kept blocks exactly."""


def random_prompts(layout: PageLayout, dtype: torch.dtype, layers: int = 1) -> PromptPages:
    """Three prompts in a cache of ``layers`` * LAYER_PAGES pages; block 0 is nobody's."""
    generator = torch.Generator().manual_seed(layout.block_size)
    blocks = torch.randperm(NUM_BLOCKS - 1, generator=generator)[:90].view(3, 30) + 1
    shape = (layers * LAYER_PAGES, 2 * layout.block_size * layout.head_size)
    pages = torch.randint(0, 200, shape, generator=generator).to(dtype)
    return PromptPages(pages, blocks, HEADS, layout)


def rows_of(prompts: PromptPages, layers: int) -> PromptPages:
    """The same prompts in each of the layers."""
    shift = torch.arange(layers)[:, None, None] * NUM_BLOCKS
    return prompts._replace(block_table=(prompts.block_table + shift).flatten(0, 1))


def random_kept(size: int, layers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ascending positions [R, Hkv, K], out of range where unused; pages and their starts [R, Hkv].

    K is no whole number of pages.
    """
    generator = torch.Generator().manual_seed(size)
    counts = torch.tensor(COUNTS[layers])
    start = counts.cumsum(1) - counts
    count, start = (x.view(3, layers, HEADS).transpose(0, 1).flatten(0, 1) for x in (counts, start))
    kept = torch.full((3 * layers, HEADS, 14 * size + 3), 30 * size)
    for row in range(3 * layers):
        for head in range(HEADS):
            order = torch.randperm(int(NUM_FULL[row % 3]) * size, generator=generator)
            num = int(count[row, head]) * size
            kept[row, head, :num] = order[:num].sort().values
    return kept, count, start


def random_staged(layout: PageLayout, dtype: torch.dtype, layers: int) -> torch.Tensor:
    """[3, pages, block_size * 2 * D], more pages than any prompt has."""
    shape = (3, layers * int(NUM_KEPT.max()) * HEADS + 2, layout.block_size * 2 * layout.head_size)
    generator = torch.Generator().manual_seed(layers)
    return torch.randint(0, 200, shape, generator=generator).to(dtype)
