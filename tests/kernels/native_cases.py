# SPDX-License-Identifier: Apache-2.0
"""Prompts in the pages of CPUs, NaN wherever nobody may look."""

import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages

NAN = float("nan")
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def prompts_of(
    lengths: list[int],
    num_kv_heads: int,
    head_size: int,
    size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> PromptPages:
    """Paged prompts in a scrambled layout; whatever lies past a prompt's end is NaN.

    Keys of float8 pages have a scale per row.
    """
    num_blocks = -(-max(lengths) // size)
    numel = size * head_size
    order = [torch.randperm(numel, generator=generator) + part * numel for part in (0, 1)]
    pages = torch.randn(
        (1 + len(lengths) * num_blocks) * num_kv_heads, 2 * numel, generator=generator
    )
    table = 1 + torch.randperm(len(lengths) * num_blocks, generator=generator).view(-1, num_blocks)
    pages[:num_kv_heads] = NAN  # nobody's block
    for row, length in enumerate(lengths):
        full, used = divmod(length, size)
        if used:
            stale = order[0].view(size, head_size)[used:].flatten()
            last = int(table[row, full]) * num_kv_heads
            pages[last : last + num_kv_heads, stale] = NAN
        table[row, -(-length // size) :] = 0
    layout = PageLayout(size, head_size, *order)
    scale = 0.37 / (1 + torch.arange(len(lengths))) if dtype.itemsize == 1 else None
    return PromptPages(pages.to(dtype), table, num_kv_heads, layout, scale)


def scales_of(num: int, scale: float) -> torch.Tensor:
    """[num] float32, each one half of the one before."""
    return scale * 0.5 ** torch.arange(num)
