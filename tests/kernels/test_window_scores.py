# SPDX-License-Identifier: Apache-2.0
"""The Triton window-score kernels against their definition."""

import pytest
import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages, reference, window_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("prompt_lens", "num_q_heads", "num_kv_heads", "head_size", "window", "size"),
    [
        ([63], 1, 1, 64, 1, 16),
        ([40, 130], 8, 2, 32, 32, 16),
        ([1000, 33, 512], 7, 1, 80, 8, 32),
        ([1100, 2060], 4, 4, 128, 32, 16),
    ],
)
@pytest.mark.parametrize(("softcap", "reduction"), [(0.0, "mean"), (5.0, "max")])
def test_equals_the_reference(
    prompt_lens,
    num_q_heads,
    num_kv_heads,
    head_size,
    window,
    size,
    softcap,
    reduction,
):
    generator = torch.Generator().manual_seed(head_size)
    num, num_blocks = len(prompt_lens), -(-max(prompt_lens) // size)
    queries = 2 * torch.randn(num, window, num_q_heads, head_size, generator=generator)
    shape = ((num * num_blocks + 1) * num_kv_heads, size * 2 * head_size)
    pages = torch.randn(shape, generator=generator)
    pages[:num_kv_heads] = float("nan")  # nobody's block
    table = torch.randperm(num * num_blocks, generator=generator).view(num, num_blocks) + 1
    for row, length in enumerate(prompt_lens):
        table[row, -(-length // size) :] = 0
    lens = torch.tensor(prompt_lens)
    scale = head_size**-0.5
    prompts = PromptPages(pages, table, num_kv_heads, PageLayout(size, head_size))
    keys = reference.read_prompt(prompts, "key")
    expected = reference.window_scores(queries, keys, lens, scale, softcap, reduction)
    prompts = prompts._replace(pages=pages.to(DEVICE), block_table=table.to(DEVICE))
    found = window_attention.window_scores(
        queries.to(DEVICE), prompts, lens.to(DEVICE), scale, softcap, reduction
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7)
