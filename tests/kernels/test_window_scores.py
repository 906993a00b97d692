# SPDX-License-Identifier: Apache-2.0
"""The Triton window-score kernels against their definition."""

import pytest
import torch
from prompt_cases import DEVICE, on_device, random_prompts

from vllm_kvcompress.kernels import reference, window_attention


@pytest.mark.parametrize(
    ("prompt_lens", "num_q_heads", "num_kv_heads", "head_size", "window", "size"),
    [
        ([1, 63], 1, 1, 64, 1, 16),
        ([40, 130], 8, 2, 32, 32, 16),
        ([1000, 33, 512], 7, 1, 80, 8, 32),
        ([33, 4097], 2, 2, 128, 32, 16),
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
    shape = (len(prompt_lens), window, num_q_heads, head_size)
    queries = 2 * torch.randn(shape, generator=generator)
    prompts = random_prompts(prompt_lens, num_kv_heads, head_size, size)
    lens = torch.tensor(prompt_lens)
    scale = head_size**-0.5
    keys = reference.read_prompt(prompts, "key")
    expected = reference.window_scores(queries, keys, lens, scale, softcap, reduction)
    found = window_attention.window_scores(
        queries.to(DEVICE), on_device(prompts), lens.to(DEVICE), scale, softcap, reduction
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7)
