# SPDX-License-Identifier: Apache-2.0
"""The C++ operations against their definitions, element by element."""

import pytest
import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, native, reference

HEADS, HEAD_SIZE = 3, 24


def permuted_layout(block_size: int, generator: torch.Generator) -> PageLayout:
    """Keys in a random order in the first half of a page, values in the second."""
    numel = block_size * HEAD_SIZE
    orders = [torch.randperm(numel, generator=generator) + i * numel for i in (0, 1)]
    return PageLayout(block_size, HEAD_SIZE, *orders)


def test_this_installation_has_them():
    assert native.available(), "csrc/ was not built: install with --no-build-isolation"


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["key", "value"])
def test_read_prompt(block_size, dtype, part):
    generator = torch.Generator().manual_seed(block_size)
    layout = permuted_layout(block_size, generator)
    pages = torch.randn(40 * HEADS, 2 * block_size * HEAD_SIZE, generator=generator).to(dtype)
    table = torch.randint(0, 40, (5, 70), generator=generator)[:, :63]
    prompts = PromptPages(pages, table, HEADS, layout)
    expected = reference.read_prompt(prompts, part)
    assert torch.equal(native.read_prompt(prompts, part), expected.float())


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_compact_pages(block_size, dtype):
    """Ragged heads, sources inside the targets, several requests; other pages stay as they are."""
    generator = torch.Generator().manual_seed(block_size)
    layout = permuted_layout(block_size, generator)
    num_full, num_kept = torch.tensor([9, 4, 30]), torch.tensor([2, 3, 5])
    blocks = torch.randperm(99, generator=generator)[:90].view(3, 30) + 1  # block 0 is nobody's
    count = torch.tensor([[1, 2, 3], [3, 3, 3], [0, 14, 1]])
    start = count.cumsum(1) - count
    max_kept = 14 * block_size
    kept = torch.full((3, HEADS, max_kept), 30 * block_size)
    for i in range(3):
        for head in range(HEADS):
            num = int(count[i, head]) * block_size
            order = torch.randperm(int(num_full[i]) * block_size, generator=generator)
            kept[i, head, :num] = order[:num].sort().values
    shape = (100 * HEADS, 2 * block_size * HEAD_SIZE)
    pages = torch.randint(0, 200, shape, generator=generator).to(dtype)
    expected, found = pages.clone(), pages.clone()
    tables = (kept, count, start, num_full, num_kept)
    reference.compact_pages(PromptPages(expected, blocks, HEADS, layout), *tables)
    native.compact_pages(PromptPages(found, blocks, HEADS, layout), *tables)
    assert torch.equal(found[HEADS:], expected[HEADS:])
    assert torch.equal(found[:HEADS], pages[:HEADS])
    assert not torch.equal(found, pages)
