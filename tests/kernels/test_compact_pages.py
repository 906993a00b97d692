# SPDX-License-Identifier: Apache-2.0
"""The Triton compaction kernels against their definitions."""

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

from vllm_kvcompress.kernels import PageLayout, PromptPages, compaction, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(prompts: PromptPages) -> PromptPages:
    """The same with pages of its own."""
    pages, table = prompts.pages.clone().to(DEVICE), prompts.block_table.to(DEVICE)
    return prompts._replace(pages=pages, block_table=table)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("head_size", [80, 128])
def test_staging_equals_the_reference(size, dtype, head_size):
    """Ragged heads of several requests, counts inside a page."""
    prompts = random_prompts(PageLayout(size, head_size), dtype)
    kept, count = random_kept(size)
    expected = reference.stage_tokens(prompts, kept, count)
    found = compaction.stage_tokens(on_device(prompts), kept.to(DEVICE), count.to(DEVICE)).cpu()
    used = torch.arange(kept.shape[2]) < count[:, :, None]
    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert torch.equal(found[used], expected[used])


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("head_size", [80, 128])
@pytest.mark.parametrize(("layers", "in_one"), [(1, False), (2, False), (2, True)])
def test_writing_equals_the_reference(size, dtype, head_size, layers, in_one):
    """Runs that cross heads and layers; other pages stay as they are, the null block's too."""
    layout = PageLayout(size, head_size)
    prompts = random_prompts(layout, dtype, layers)
    runs = random_runs(layout, dtype, layers, in_one)
    layer_pages = LAYER_PAGES if layers > 1 else 0
    found, expected = on_device(prompts), prompts._replace(pages=prompts.pages.clone())
    tables = (*runs, NUM_FULL, NUM_KEPT)
    reference.write_pages(expected, *tables, layer_pages)
    compaction.write_pages(found, *(t.to(DEVICE) for t in tables), layer_pages)
    pages = found.pages.cpu()
    assert torch.equal(pages[HEADS:], expected.pages[HEADS:])
    assert torch.equal(pages[:HEADS], prompts.pages[:HEADS])
    changed = (pages != prompts.pages).any(1).view(layers, -1).sum(1)
    assert changed.tolist() == [int(NUM_KEPT.sum()) * HEADS] * layers
