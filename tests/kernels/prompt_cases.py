# SPDX-License-Identifier: Apache-2.0
"""Prompts in random pages, NaN wherever nobody may look."""

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_prompts(lengths: list[int], num_kv_heads: int, head_size: int, size: int) -> PromptPages:
    """Keys of as many rows in token-row pages of ``size`` tokens; every other element is NaN."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_size)
    num, num_blocks = len(lengths), -(-max(lengths) // size)
    shape = ((num * num_blocks + 1) * num_kv_heads, size, 2, head_size)
    pages = torch.randn(shape, generator=generator)
    pages[:num_kv_heads] = float("nan")  # nobody's block
    pages[:, :, 1] = float("nan")  # values
    table = torch.randperm(num * num_blocks, generator=generator).view(num, num_blocks) + 1
    for row, length in enumerate(lengths):
        table[row, -(-length // size) :] = 0
        if length % size:
            last = int(table[row, length // size]) * num_kv_heads
            pages[last : last + num_kv_heads, length % size :] = float("nan")
    return PromptPages(pages.flatten(1), table, num_kv_heads, PageLayout(size, head_size))


def on_device(prompts: PromptPages) -> PromptPages:
    pages, table = prompts.pages.to(DEVICE), prompts.block_table.to(DEVICE)
    return prompts._replace(pages=pages, block_table=table)


def row_scales(scale: float, num: int) -> torch.Tensor:
    """[num] float32: every row has one of its own."""
    return scale * (1 + torch.arange(num) / 8)
