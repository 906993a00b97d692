# SPDX-License-Identifier: Apache-2.0
"""The Triton window-score kernels against their definition."""

import pytest
import torch
from prompt_cases import DEVICE, on_device, random_prompts, row_scales

from vllm_kvcompress.kernels import reference, splits, window_attention


@pytest.mark.parametrize(
    ("prompt_lens", "num_q_heads", "num_kv_heads", "head_size", "window", "size"),
    [
        ([1, 63], 1, 1, 64, 1, 16),
        ([40, 130], 8, 2, 32, 32, 16),
        ([1000, 33, 512], 7, 1, 80, 8, 32),
        ([33, 1100], 2, 2, 128, 32, 16),
        ([70], 6, 2, 32, 20, 16),
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
    scale = row_scales(head_size**-0.5, len(prompt_lens))
    keys = reference.read_prompt(prompts, "key")
    expected = reference.window_scores(queries, keys, lens, scale, softcap, reduction)
    found = window_attention.window_scores(
        queries.to(DEVICE),
        on_device(prompts),
        lens.to(DEVICE),
        scale.to(DEVICE),
        softcap,
        reduction,
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-7)


def test_scores_do_not_depend_on_the_number_of_programs(monkeypatch):
    """Bit for bit, so that they do not depend on the number of rows in a call either."""
    queries = torch.randn(2, 4, 2, 32, generator=torch.Generator().manual_seed(0))
    prompts, lens = random_prompts([900, 300], 2, 32, 16), torch.tensor([900, 300])
    arguments = (queries.to(DEVICE), on_device(prompts), lens.to(DEVICE))

    def scores(parts: int) -> torch.Tensor:
        monkeypatch.setattr(splits, "parts_per_split", lambda *_: parts)
        scale = row_scales(0.2, 2).to(DEVICE)
        return torch.stack(window_attention.window_scores(*arguments, scale))

    assert torch.equal(scores(1), scores(4))


@pytest.mark.parametrize("length", [1, 256, 8192, 131072])
@pytest.mark.parametrize("sequences", [1, 4, 112, 896, 5000])
def test_programs_fill_the_gpu(sequences, length):
    """Of the least number of keys that the fullest multiprocessor could have, no more than 1.5."""
    room = 2 * splits.num_multiprocessors(torch.device("cpu"))
    parts = -(-length // splits.KEYS_PER_PART)
    each = splits.parts_per_split(sequences, length, torch.device("cpu"))
    assert 1 <= each <= parts
    waves = -(-sequences * -(-parts // each) // room)
    assert waves * each <= max(1.5 * sequences * parts / room, 1 + sequences / room, parts / 64 + 1)
