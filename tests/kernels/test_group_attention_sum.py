# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for what groups of proxies look at, their definition, and plain loops."""

import pytest
import torch
from prompt_cases import DEVICE, on_device, random_prompts, row_scales

from vllm_kvcompress.kernels import proxy_attention, reference

CASES = [
    # prompt lengths, query heads, KV heads, D, block size, proxies, groups
    (([1], 1, 1, 64, 16, 1, 1), 5.0),
    (([63, 40], 8, 2, 32, 16, 12, 3), 5.0),
    (([130, 33, 1], 7, 1, 80, 32, 70, 7), 0.0),
    (([1000, 700], 1, 1, 128, 16, 6, 2), 0.0),
    (([200], 28, 4, 64, 16, 16, 1), 5.0),
]


def naive(queries, prompts, lengths, num_groups, scale, softcap):
    """[N, Hkv, NG, T] in double precision."""
    keys = reference.read_prompt(prompts, "key").double()
    num, num_rows, num_q_heads, _ = queries.shape
    group = num_q_heads // prompts.num_kv_heads
    total = torch.zeros(num, prompts.num_kv_heads, num_groups, keys.shape[2], dtype=torch.float64)
    for n, length in enumerate(lengths):
        for i in range(num_rows):
            for head in range(num_q_heads):
                logits = (
                    keys[n, head // group, :length]
                    @ queries[n, i, head].double()
                    * scale[n].double()
                )
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                row = total[n, head // group, i // (num_rows // num_groups)]
                row[:length] += logits.softmax(0) / group
    return total


@pytest.mark.parametrize(("shape", "softcap"), CASES, ids=str)
def test_against_loops(shape, softcap):
    lengths, num_q_heads, num_kv_heads, head_size, size, num_rows, num_groups = shape
    prompts = random_prompts(lengths, num_kv_heads, head_size, size)
    generator = torch.Generator().manual_seed(num_rows)
    # proxies are inflated: their rows are peaked
    queries = 5 * torch.randn(len(lengths), num_rows, num_q_heads, head_size, generator=generator)
    lens, scale = torch.tensor(lengths), row_scales(head_size**-0.5, len(lengths))
    expected = naive(queries, prompts, lengths, num_groups, scale, softcap)
    keys = reference.read_prompt(prompts, "key")
    defined = reference.group_attention_sum(queries, keys, lens, num_groups, scale, softcap)
    torch.testing.assert_close(defined.double(), expected, rtol=1e-4, atol=1e-6)
    found = proxy_attention.group_attention_sum(
        queries.to(DEVICE),
        on_device(prompts),
        lens.to(DEVICE),
        num_groups,
        scale.to(DEVICE),
        softcap,
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)


def test_half_precision():
    """Products of 16-bit numbers are exact in float32, where they are summed."""
    prompts = random_prompts([90, 40], 2, 64, 16)
    prompts = prompts._replace(pages=prompts.pages.half())
    queries = torch.randn(2, 8, 4, 64, generator=torch.Generator().manual_seed(0)).half()
    scale = row_scales(0.125, 2)
    expected = naive(queries, prompts, [90, 40], 2, scale, 0.0)
    lens = torch.tensor([90, 40], device=DEVICE)
    found = proxy_attention.group_attention_sum(
        queries.to(DEVICE), on_device(prompts), lens, 2, scale.to(DEVICE)
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)
