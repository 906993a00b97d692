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
    random_staged,
    rows_of,
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
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("part", ["key", "value"])
def test_read_prompt(block_size, dtype, part):
    generator = torch.Generator().manual_seed(block_size)
    layout = permuted_layout(block_size, generator)
    pages = torch.randn(40 * HEADS, 2 * block_size * HEAD_SIZE, generator=generator).to(dtype)
    scales = torch.rand(2, 5, generator=generator) if dtype.itemsize == 1 else (None, None)
    table = torch.randint(0, 40, (5, 70), generator=generator)[:, :63]
    prompts = PromptPages(pages, table, HEADS, layout, *scales)
    expected = reference.read_prompt(prompts, part)
    assert torch.equal(native.read_prompt(prompts, part), expected.float())


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layers", [1, 2])
def test_stage_tokens(block_size, dtype, layers):
    """Ragged heads of several prompts; pages that are no head's stay as they are."""
    layout = permuted_layout(block_size, torch.Generator().manual_seed(block_size))
    prompts = rows_of(random_prompts(layout, dtype, layers), layers)
    found, expected = (random_staged(layout, dtype, layers) for _ in range(2))
    kept = random_kept(block_size, layers)
    reference.stage_tokens(prompts, *kept, expected)
    native.stage_tokens(prompts, *kept, found)
    assert torch.equal(found, expected)


def test_pages_that_do_not_fit_are_refused():
    layout = permuted_layout(16, torch.Generator().manual_seed(16))
    prompts, staged = random_prompts(layout, torch.float32), torch.zeros(3, 4, 32 * HEAD_SIZE)
    with pytest.raises(RuntimeError, match="up to page 4, got 3 from page 3"):
        native.stage_tokens(prompts, *random_kept(16, 1), staged)
    with pytest.raises(RuntimeError, match="staged: expected contiguous"):
        native.stage_tokens(prompts, *random_kept(16, 1), staged[..., 1:])


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layers", [1, 2])
def test_write_pages(block_size, dtype, layers):
    """Pages that cross heads and layers; other pages stay as they are, the null block's too."""
    layout = permuted_layout(block_size, torch.Generator().manual_seed(block_size))
    prompts, staged = random_prompts(layout, dtype, layers), random_staged(layout, dtype, layers)
    found, expected = prompts.pages.clone(), prompts.pages.clone()
    tables = (staged, layers * HEADS * NUM_KEPT, NUM_FULL, NUM_KEPT, LAYER_PAGES)
    reference.write_pages(prompts._replace(pages=expected), *tables)
    native.write_pages(prompts._replace(pages=found), *tables)
    assert torch.equal(found[HEADS:], expected[HEADS:])
    assert torch.equal(found[:HEADS], prompts.pages[:HEADS])
    changed = (found != prompts.pages).any(1).view(layers, -1).sum(1)
    assert changed.tolist() == [int(NUM_KEPT.sum()) * HEADS] * layers
