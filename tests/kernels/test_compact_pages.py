# SPDX-License-Identifier: Apache-2.0
"""The Triton compaction kernels against their definition."""

import pytest
import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, compaction, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("head_size", [24, 64])
def test_equals_the_reference(size, dtype, head_size):
    """Ragged heads, sources inside the targets, several requests; other pages stay as they are."""
    generator = torch.Generator().manual_seed(size)
    num_heads = 3
    num_full, num_kept = torch.tensor([9, 4, 30]), torch.tensor([2, 3, 5])
    blocks = torch.randperm(99, generator=generator)[:90].view(3, 30) + 1  # block 0 is nobody's
    count = torch.tensor([[1, 2, 3], [3, 3, 3], [0, 14, 1]])
    start = count.cumsum(1) - count
    kept = torch.full((3, num_heads, 14 * size), 30 * size)
    for row in range(3):
        for head in range(num_heads):
            num = int(count[row, head]) * size
            order = torch.randperm(int(num_full[row]) * size, generator=generator)
            kept[row, head, :num] = order[:num].sort().values
    shape = (100 * num_heads, 2 * size * head_size)
    pages = torch.randint(0, 200, shape, generator=generator).to(dtype)
    layout = PageLayout(size, head_size)
    tables = (kept, count, start, num_full, num_kept)
    expected = pages.clone()
    reference.compact_pages(PromptPages(expected, blocks, num_heads, layout), *tables)
    found = pages.clone().to(DEVICE)
    prompts = PromptPages(found, blocks.to(DEVICE), num_heads, layout)
    compaction.compact_pages(prompts, *(t.to(DEVICE) for t in tables))
    found = found.cpu()
    assert torch.equal(found[num_heads:], expected[num_heads:])
    assert torch.equal(found[:num_heads], pages[:num_heads])
    assert not torch.equal(found, pages)
