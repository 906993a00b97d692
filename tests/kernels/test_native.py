# SPDX-License-Identifier: Apache-2.0
"""The C++ operations against their definitions, element by element."""

import pytest
import torch
from compactions import (
    HEADS,
    LAYER_PAGES,
    NUM_FULL,
    NUM_KEPT,
    random_kept,
    random_prompts,
    random_runs,
)

from vllm_kvcompress.kernels import PageLayout, PromptPages, native, reference

HEAD_SIZE = 24

pytestmark = pytest.mark.usefixtures("cpp")


def permuted_layout(block_size: int, generator: torch.Generator) -> PageLayout:
    """Keys in a random order in the first half of a page, values in the second."""
    numel = block_size * HEAD_SIZE
    orders = [torch.randperm(numel, generator=generator) + i * numel for i in (0, 1)]
    return PageLayout(block_size, HEAD_SIZE, *orders)


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
def test_stage_tokens(block_size, dtype):
    """Ragged heads of several requests, counts inside a page."""
    layout = permuted_layout(block_size, torch.Generator().manual_seed(block_size))
    prompts = random_prompts(layout, dtype)
    kept, count = random_kept(block_size)
    expected = reference.stage_tokens(prompts, kept, count)
    found = native.stage_tokens(prompts, kept, count)
    used = torch.arange(kept.shape[2]) < count[:, :, None]
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert torch.equal(found[used], expected[used])


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("layers", "in_one"), [(1, False), (2, False), (2, True)])
def test_write_pages(block_size, dtype, layers, in_one):
    """Runs that cross heads and layers; other pages stay as they are, the null block's too."""
    layout = permuted_layout(block_size, torch.Generator().manual_seed(block_size))
    prompts = random_prompts(layout, dtype, layers)
    runs = random_runs(layout, dtype, layers, in_one)
    layer_pages = LAYER_PAGES if layers > 1 else 0
    found, expected = prompts.pages.clone(), prompts.pages.clone()
    tables = (*runs, NUM_FULL, NUM_KEPT, layer_pages)
    reference.write_pages(prompts._replace(pages=expected), *tables)
    native.write_pages(prompts._replace(pages=found), *tables)
    assert torch.equal(found[HEADS:], expected[HEADS:])
    assert torch.equal(found[:HEADS], prompts.pages[:HEADS])
    changed = (found != prompts.pages).any(1).view(layers, -1).sum(1)
    assert changed.tolist() == [int(NUM_KEPT.sum()) * HEADS] * layers
