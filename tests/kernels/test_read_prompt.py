# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel that reads prompts against its definition, element by element."""

import pytest
import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, prompt_rows, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("head_size", [80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_equals_the_reference(part, size, head_size, dtype):
    """Prompts of an odd number of blocks, in any order, some of them shared."""
    generator = torch.Generator().manual_seed(size)
    heads, num_blocks = 3, 30
    shape = (num_blocks * heads, 2 * size * head_size)
    pages = torch.randint(0, 200, shape, generator=generator).to(dtype)
    table = torch.randint(0, num_blocks, (2, 7), generator=generator)[:, :5]
    prompts = PromptPages(pages, table, heads, PageLayout(size, head_size))
    expected = reference.read_prompt(prompts, part)
    on_device = prompts._replace(pages=pages.to(DEVICE), block_table=table.to(DEVICE))
    found = prompt_rows.read_prompt(on_device, part)
    assert found.dtype == dtype
    assert torch.equal(found.cpu(), expected)
