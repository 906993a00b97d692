# SPDX-License-Identifier: Apache-2.0
"""The Triton compaction kernels against their definitions."""

import pytest
import torch
from kept_cases import LAYER_PAGES, Kept, kept_tokens

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
    """Ragged heads of several prompts in two layers; no other page is touched."""
    case = kept_tokens(PageLayout(size, head_size), dtype)
    expected, found = case.staged.clone(), case.staged.clone().to(DEVICE)
    tables = (case.kept, case.count, case.start)
    reference.stage_tokens(case.rows, *tables, expected)
    compaction.stage_tokens(on_device(case.rows), *(t.to(DEVICE) for t in tables), found)
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(expected, case.staged)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("head_size", [80, 128])
def test_writing_equals_the_reference(size, dtype, head_size):
    """Pages of two layers; other pages stay as they are, the null block's too."""
    case = kept_tokens(PageLayout(size, head_size), dtype)
    expected, found = on_device(case.prompts), on_device(case.prompts)
    numbers = (case.staged, *case.numbers)
    reference.write_pages(expected, *(t.to(DEVICE) for t in numbers), LAYER_PAGES)
    compaction.write_pages(found, *(t.to(DEVICE) for t in numbers), LAYER_PAGES)
    heads, before = case.prompts.num_kv_heads, case.prompts.pages
    assert torch.equal(found.pages[heads:], expected.pages[heads:])
    assert torch.equal(found.pages[:heads].cpu(), before[:heads])
    changed = (found.pages.cpu() != before).any(1)
    assert int(changed.sum()) == int(case.numbers[0].sum())


def test_tokens_reach_their_pages():
    """Through both, against a loop over tokens."""
    size, head_size = 16, 32
    case = kept_tokens(PageLayout(size, head_size), torch.float32)
    expected, found = case.prompts.pages.clone(), on_device(case.prompts)
    _compact_by_loop(case, expected, size)
    staged = case.staged.to(DEVICE)
    rows = case.rows._replace(pages=found.pages, block_table=case.rows.block_table.to(DEVICE))
    tables = (case.kept, case.count, case.start)
    compaction.stage_tokens(rows, *(t.to(DEVICE) for t in tables), staged)
    compaction.write_pages(found, staged, *(t.to(DEVICE) for t in case.numbers), LAYER_PAGES)
    assert torch.equal(found.pages.cpu(), expected)


def _compact_by_loop(case: Kept, pages: torch.Tensor, size: int) -> None:
    heads, tokens = case.prompts.num_kv_heads, case.prompts.pages.view(-1, size, 64)
    target = pages.view(-1, size, 64)
    num_pages, num_full, num_kept = (numbers.tolist() for numbers in case.numbers)
    for row, (counts, starts) in enumerate(zip(case.count, case.start, strict=True)):
        prompt = row % len(num_full)
        n, m = num_kept[prompt], num_full[prompt]
        for head in range(heads):
            for k in range(int(counts[head]) * size):
                number, position = int(starts[head]) + k // size, int(case.kept[row, head, k])
                assert number < num_pages[prompt]
                layer, within = divmod(number, n * heads)
                block = int(case.prompts.block_table[prompt, m - n + within % n])
                page = layer * LAYER_PAGES + block * heads + within // n
                source = int(case.rows.block_table[row, position // size]) * heads + head
                target[page, k % size] = tokens[source, position % size]
