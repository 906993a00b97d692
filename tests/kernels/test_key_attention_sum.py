# SPDX-License-Identifier: Apache-2.0
"""The Triton column-sum kernels against their definition, and that against a loop over rows."""

import math

import pytest
import torch
from prompt_cases import row_scales

from vllm_kvcompress.kernels import PageLayout, PromptPages, column_attention, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chunks(ends, lengths, num_q_heads, num_kv_heads, head_size, size):
    """Queries right-aligned, prompts and (lengths, positions); NaN wherever nobody may look."""
    generator = torch.Generator().manual_seed(head_size + len(ends))
    num, width, num_blocks = len(ends), max(lengths), -(-max(ends) // size)
    queries = 2 * torch.randn(num, width, num_q_heads, head_size, generator=generator)
    shape = ((num * num_blocks + 1) * num_kv_heads, size, 2, head_size)
    pages = torch.randn(shape, generator=generator)
    pages[:num_kv_heads] = float("nan")  # nobody's block
    pages[:, :, 1] = float("nan")  # values
    table = torch.randperm(num * num_blocks, generator=generator).view(num, num_blocks) + 1
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        queries[row, : width - length] = float("nan")
        table[row, -(-end // size) :] = 0
        if end % size:
            last = int(table[row, end // size]) * num_kv_heads
            pages[last : last + num_kv_heads, end % size :] = float("nan")
    prompts = PromptPages(pages.flatten(1), table, num_kv_heads, PageLayout(size, head_size))
    lengths = torch.tensor(lengths)
    return queries, prompts, (lengths, torch.tensor(ends) - lengths)


def naive(queries, prompts, numbers, scale, softcap):
    """[M, Hkv, T] in double precision, and the log-sum-exps [M, Hq, C]."""
    keys = reference.read_prompt(prompts, "key").double()
    num, width, num_q_heads, _ = queries.shape
    group = num_q_heads // prompts.num_kv_heads
    total = torch.zeros(keys.shape[:3], dtype=torch.float64)
    lse = torch.full((num, num_q_heads, width), float("nan"))
    for row, (length, position) in enumerate(zip(*(n.tolist() for n in numbers), strict=True)):
        for i in range(length):
            column = width - length + i
            for head in range(num_q_heads):
                seen = keys[row, head // group, : position + i + 1]
                logits = seen @ queries[row, column, head].double() * scale[row].double()
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                lse[row, head, column] = logits.logsumexp(0)
                total[row, head // group, : position + i + 1] += logits.softmax(0) / group
    return total, lse


def on_device(queries, prompts, numbers):
    pages, table = prompts.pages.to(DEVICE), prompts.block_table.to(DEVICE)
    return (
        queries.to(DEVICE),
        *(number.to(DEVICE) for number in numbers),
        prompts._replace(pages=pages, block_table=table),
    )


@pytest.mark.parametrize(
    ("shape", "softcap"),
    [
        # ends, lengths, query heads, KV heads, D, block size: whole prompts, later chunks, one row
        (([63], [63], 1, 1, 64, 16), 0.0),
        (([100, 33, 70], [40, 33, 1], 8, 2, 32, 16), 5.0),
        (([100, 33, 70], [40, 33, 1], 8, 2, 32, 16), 0.0),
        (([200, 130], [130, 7], 7, 1, 80, 32), 0.0),
        (([1, 65], [1, 64], 4, 4, 128, 16), 5.0),
        (([1000, 300], [3, 5], 2, 1, 64, 32), 5.0),
    ],
)
def test_against_loops(shape, softcap):
    queries, prompts, numbers = chunks(*shape)
    scale = row_scales(shape[4] ** -0.5, len(shape[0]))
    expected, lse = naive(queries, prompts, numbers, scale, softcap)
    keys = reference.read_prompt(prompts, "key").nan_to_num(0.0)
    defined = reference.key_attention_sum(queries.nan_to_num(0.0), *numbers, keys, scale, softcap)
    torch.testing.assert_close(defined.double(), expected, rtol=1e-4, atol=1e-6)
    arguments = on_device(queries, prompts, numbers)
    found = column_attention.key_attention_sum(*arguments, scale.to(DEVICE), softcap).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    # twice the true sums of exponentials: half the probabilities
    given = (lse + math.log(2)).to(DEVICE)
    found = column_attention.key_attention_sum(*arguments, scale.to(DEVICE), softcap, given).cpu()
    torch.testing.assert_close(2 * found.double(), expected, rtol=1e-4, atol=1e-6)


def test_chunks_add_up():
    """Sums of the chunks are the sums of the whole prompt."""
    queries, prompts, (lengths, positions) = chunks([150], [150], 4, 2, 32, 16)
    queries, lengths, positions, prompts = on_device(queries, prompts, (lengths, positions))
    scale = torch.tensor([0.2], device=DEVICE)
    whole = column_attention.key_attention_sum(queries, lengths, positions, prompts, scale)
    parts = [
        column_attention.key_attention_sum(
            queries[:, a:b], lengths - 150 + b - a, positions + a, prompts, scale
        )
        for a, b in ((0, 70), (70, 149), (149, 150))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    assert whole[..., :150].sum(-1).cpu().tolist() == [[pytest.approx(150)] * 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Products of 16-bit numbers are exact in float32, where they are summed."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers as integers")
    queries, prompts, numbers = chunks([90, 40], [60, 40], 4, 2, 64, 16)
    queries = queries.to(dtype)
    prompts = prompts._replace(pages=prompts.pages.to(dtype))
    scale = row_scales(0.125, 2)
    expected, _ = naive(queries, prompts, numbers, scale, 0.0)
    found = column_attention.key_attention_sum(
        *on_device(queries, prompts, numbers), scale.to(DEVICE)
    ).cpu()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
