# SPDX-License-Identifier: Apache-2.0
"""Keys that an instruction looks at strongly, and statistics of visual attention, every way."""

import math

import numpy as np
import pytest
import torch
from native_cases import prompts_of
from prompt_cases import DEVICE, on_device, random_prompts, row_scales

from vllm_kvcompress.kernels import native, reference, skewness, strong_keys


def queries_of(texts, num_rows, num_q_heads, head_size):
    """[R, Q, Hq, D], NaN before the instruction."""
    generator = torch.Generator().manual_seed(num_rows + head_size)
    queries = torch.full((len(texts), num_rows, num_q_heads, head_size), float("nan"))
    for row, text in zip(queries, texts, strict=True):
        row[num_rows - text :] = torch.randn((text, num_q_heads, head_size), generator=generator)
    return queries


def probabilities(queries, keys, lengths, texts, scale, softcap):
    """(row, head, query token) and its attention on the keys that it sees, in double precision."""
    num_rows, group = queries.shape[1], queries.shape[2] // keys.shape[1]
    for n, (length, text) in enumerate(zip(lengths, texts, strict=True)):
        for head in range(queries.shape[2]):
            seen = keys[n, head // group, :length].double()
            for i in range(num_rows - text, num_rows):
                z = seen[: length - num_rows + i + 1] @ queries[n, i, head].double()
                z *= scale[n].double()
                z = softcap * torch.tanh(z / softcap) if softcap else z
                yield (n, head, i), z.softmax(0)


def naive(*case, threshold):
    """Counts, and how many more or fewer rounding may make of them."""
    queries, _, lengths = case[:3]
    counts = torch.zeros(len(lengths), queries.shape[2], queries.shape[1], dtype=torch.int64)
    doubtful = torch.zeros_like(counts)
    for place, probs in probabilities(*case):
        bound = threshold * probs.max()
        counts[place] = (probs >= bound).sum()
        doubtful[place] = ((probs / bound - 1).abs() < 1e-4).sum() if threshold else 0
    return counts, doubtful


CASES = [
    # prompt lengths, instructions, Q; query heads, KV heads, D, block size; softcap, threshold
    (([63, 1], [20, 1], 20), (1, 1, 64, 16), 0.0, 0.01),
    (([100, 41], [33, 5], 33), (8, 2, 32, 16), 5.0, 0.3),  # several tiles of rows
    (([130, 9], [3, 1], 8), (7, 1, 80, 32), 0.0, 0.0),  # all keys that a row sees
    (([700], [40], 70), (4, 2, 128, 16), 0.0, 1.0),  # the favourites alone
]


@pytest.mark.parametrize(("rows", "heads", "softcap", "threshold"), CASES, ids=str)
class TestStrongKeys:
    def check(self, found, expected):
        counts, doubtful = expected
        assert found.dtype == torch.int32
        assert ((found.cpu() - counts).abs() <= doubtful).all()

    def test_reference_and_triton(self, rows, heads, softcap, threshold):
        (lengths, texts, num_rows), (num_q_heads, num_kv_heads, head_size, size) = rows, heads
        queries = queries_of(texts, num_rows, num_q_heads, head_size)
        prompts, scale = random_prompts(lengths, num_kv_heads, head_size, size), row_scales(1, 2)
        scale = scale[: len(lengths)] * head_size**-0.5 * 3
        keys = reference.read_prompt(prompts, "key")
        expected = naive(queries, keys, lengths, texts, scale, softcap, threshold=threshold)
        assert expected[0].max() > 1 or threshold == 1
        lens, instruction = torch.tensor(lengths), torch.tensor(texts)
        numbers = (softcap, threshold)
        defined = reference.strong_key_counts(queries, keys, lens, instruction, scale, *numbers)
        self.check(defined, expected)
        tensors = (x.to(DEVICE) for x in (lens, instruction, scale))
        found = strong_keys.strong_key_counts(
            queries.to(DEVICE), on_device(prompts), *tensors, *numbers
        )
        self.check(found, expected)

    @pytest.mark.usefixtures("cpp")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_native(self, rows, heads, softcap, threshold, dtype):
        (lengths, texts, num_rows), (num_q_heads, num_kv_heads, head_size, size) = rows, heads
        queries = queries_of(texts, num_rows, num_q_heads, head_size).to(dtype)
        generator = torch.Generator().manual_seed(1)
        prompts = prompts_of(lengths, num_kv_heads, head_size, size, dtype, generator)
        scale = row_scales(3 * head_size**-0.5, len(lengths))
        keys = reference.read_prompt(prompts, "key")
        case = (queries, keys, lengths, texts, scale, softcap)
        found = native.strong_key_counts(
            queries, prompts, torch.tensor(lengths), torch.tensor(texts), scale, softcap, threshold
        )
        self.check(found, naive(*case, threshold=threshold))


@pytest.mark.usefixtures("cpp")
def test_instructions_that_do_not_fit_are_refused():
    prompts = prompts_of([64], 1, 8, 16, torch.float32, torch.Generator().manual_seed(4))
    queries, scale = torch.zeros(1, 6, 1, 8), torch.ones(1)
    for length, text, message in ((65, 1, "prompt_lens: .* 64"), (64, 7, "instruction_len: .* 6")):
        with pytest.raises(RuntimeError, match=message):
            native.strong_key_counts(
                queries, prompts, torch.tensor([length]), torch.tensor([text]), scale
            )


class TestStrengthAndSkewness:
    @pytest.mark.parametrize("factor", [1.0, 1e-9])
    def test_random_rows(self, factor):
        """More than a tile of tokens; garbage past the end, and no skewness below zero."""
        generator = torch.Generator().manual_seed(3)
        lens = torch.tensor([2500, 1024, 40, 2, 30])
        values = factor * torch.rand((5, 2512), generator=generator) ** 4
        values[2] = factor - values[2]
        segment = torch.randint(-1, 2, (5, 2512), generator=generator)
        for n, length in enumerate(lens.tolist()):
            values[n, length:] = float("nan")
            segment[n, length:] = 0
        segment[4, :30] = -1
        values[segment < 0] = 0.0
        expected = []
        for row, where, length in zip(values, segment, lens.tolist(), strict=True):
            x = row[:length][where[:length] >= 0].double().numpy()
            if x.size < 3:
                expected.append([1, 0])
                continue
            n, deviation = x.size, x.std(ddof=1)
            cubes = (((x - x.mean()) / deviation) ** 3).sum()
            expected.append([x.sum(), max(n / ((n - 1) * (n - 2)) * cubes, 0)])
        assert expected[2][1] == 0
        assert np.array(expected)[:2, 1].min() > 0.5
        rows = (values, segment, lens)
        for found in (
            reference.strength_and_skewness(*rows),
            skewness.strength_and_skewness(*(x.to(DEVICE) for x in rows)).cpu(),
        ):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)

    @pytest.mark.parametrize("implementation", [reference, skewness])
    def test_values_that_only_rounding_tells_apart(self, implementation):
        values = torch.full((1, 50), 1 / 7).to(DEVICE)
        values[0, ::3] = math.nextafter(1 / 7, 1)
        rows = (torch.zeros(1, 50).long().to(DEVICE), torch.tensor([50]).to(DEVICE))
        [[strength, skew]] = implementation.strength_and_skewness(values, *rows).tolist()
        assert strength == pytest.approx(50 / 7, rel=1e-6)
        assert skew == 0

    @pytest.mark.parametrize("implementation", [reference, skewness])
    def test_nan_stays(self, implementation):
        values = torch.rand(2, 20).to(DEVICE)
        values[0, 5] = float("nan")
        rows = (torch.zeros(2, 20).long().to(DEVICE), torch.tensor([20, 20]).to(DEVICE))
        found = implementation.strength_and_skewness(values, *rows)
        assert found[0, 0].isnan()
        assert found[1].isfinite().all()
