# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels for the elite of the instruction, their definition, and plain loops."""

import pytest
import torch
from prompt_cases import DEVICE, on_device, random_prompts, row_scales

from vllm_kvcompress.kernels import elite_rows, reference


class Case:
    """Prompts with an image in each, and instructions of which some rows are elite."""

    def __init__(self, lengths, texts, num_q_heads, num_kv_heads, head_size, size, share):
        generator = torch.Generator().manual_seed(head_size + len(lengths))
        self.lengths, self.texts = lengths, texts
        self.prompts = random_prompts(lengths, num_kv_heads, head_size, size)
        num, rows = len(lengths), max(8, *texts)
        self.queries = torch.full((num, rows, num_q_heads, head_size), float("nan"))
        self.elite = torch.zeros(num, num_q_heads, rows, dtype=torch.bool)
        # what stands after a prompt looks visual
        self.segment = torch.zeros(num, self.prompts.block_table.shape[1] * size).long()
        for n, (length, text) in enumerate(zip(lengths, texts, strict=True)):
            shape = (text, num_q_heads, head_size)
            self.queries[n, rows - text :] = 2 * torch.randn(shape, generator=generator)
            chosen = torch.rand(num_q_heads, text, generator=generator) < share
            chosen[:, int(torch.randint(text, (1,), generator=generator))] = True
            self.elite[n, :, rows - text :] = chosen
            self.segment[n, :length] = -1
            self.segment[n, length // 4 : length - text] = 1
        self.group = num_q_heads // num_kv_heads
        self.scale = row_scales(head_size**-0.5, num)

    def logits(self, n, head, row, softcap):
        """Of one row on all keys, in double precision."""
        keys = reference.read_prompt(self.prompts, "key")[n, head // self.group].double()
        z = keys @ self.queries[n, row, head].double() * self.scale[n].double()
        return softcap * torch.tanh(z / softcap) if softcap else z

    def naive(self, softcap):
        """[N, Hq, T]."""
        out = torch.zeros(*self.elite.shape[:2], self.segment.shape[1], dtype=torch.float64)
        rows = self.elite.shape[2]
        for n, length in enumerate(self.lengths):
            for head, elite in enumerate(self.elite[n]):
                chosen = elite.nonzero()[:, 0].tolist()
                for row in chosen:
                    position = length - rows + row
                    visual = [t for t in range(position + 1) if self.segment[n, t] >= 0]
                    own = [length - rows + i for i in chosen if i <= row]
                    columns = torch.tensor(sorted({*visual, *own}))
                    probs = self.logits(n, head, row, softcap)[columns].softmax(0) / len(chosen)
                    out[n, head, columns] += torch.where(self.segment[n, columns] >= 0, probs, 0.0)
        return out

    def lens(self):
        return torch.tensor(self.lengths)


CASES = [
    # prompt lengths, rows of the instructions, query heads, KV heads, D, block size;
    # share of elite, softcap
    (([63, 1], [20, 1], 1, 1, 64, 16), 0.2, 0.0),  # the second is no more than its instruction
    (([100, 41], [33, 5], 8, 2, 32, 16), 0.6, 5.0),  # more elite rows than a tile has
    (([130, 9], [3, 1], 7, 1, 80, 32), 1.0, 0.0),
    # instructions whose keys are in different parts
    (([1000, 1300], [40, 5], 2, 2, 128, 16), 0.1, 5.0),
]


@pytest.mark.parametrize(("shape", "share", "softcap"), CASES, ids=str)
def test_attention_of_the_elite(shape, share, softcap):
    case = Case(*shape, share)
    expected = case.naive(softcap)
    numbers = (case.scale, softcap)
    keys = reference.read_prompt(case.prompts, "key")
    defined = reference.elite_attention(
        case.queries, case.elite, case.segment, keys, case.lens(), *numbers
    )
    torch.testing.assert_close(defined.double(), expected, rtol=1e-4, atol=1e-7)
    tensors = (case.queries.to(DEVICE), case.elite.to(DEVICE), case.segment.to(DEVICE))
    prompts = on_device(case.prompts)
    found = elite_rows.elite_attention(
        *tensors, prompts, case.lens().to(DEVICE), case.scale.to(DEVICE), softcap
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("shape", "share", "softcap"), CASES, ids=str)
def test_last_row_on_the_instruction(shape, share, softcap):
    case = Case(*shape, share)
    num, num_heads, rows = case.elite.shape
    expected = torch.full((num, num_heads, rows), float("-inf"), dtype=torch.float64)
    for n, (length, text) in enumerate(zip(case.lengths, case.texts, strict=True)):
        for head in range(num_heads):
            z = case.logits(n, head, rows - 1, softcap)
            expected[n, head, rows - text :] = z[length - text : length]
    numbers = (case.scale, softcap)
    texts, keys = torch.tensor(case.texts), reference.read_prompt(case.prompts, "key")
    defined = reference.last_row_logits(case.queries, keys, case.lens(), texts, *numbers)
    torch.testing.assert_close(defined.double(), expected, rtol=1e-5, atol=1e-5)
    lens, texts = case.lens().to(DEVICE), texts.to(DEVICE)
    found = elite_rows.last_row_logits(
        case.queries.to(DEVICE),
        on_device(case.prompts),
        lens,
        texts,
        case.scale.to(DEVICE),
        softcap,
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_head_without_elite_has_no_attention():
    """As where a key of the instruction is NaN: nothing is worth as much as itself."""
    case = Case([70], [20], 4, 2, 32, 16, 0.5)
    case.elite[0, 1] = False
    prompts, lens = on_device(case.prompts), case.lens().to(DEVICE)
    tensors = (case.queries.to(DEVICE), case.elite.to(DEVICE), case.segment.to(DEVICE))
    found = elite_rows.elite_attention(*tensors, prompts, lens, case.scale.to(DEVICE))
    found = found.cpu()[0, :, :70]
    visual = case.segment[0, :70] >= 0
    assert found[1, visual].isnan().all()
    assert found[1, ~visual].eq(0).all()
    assert found[[0, 2, 3]].isfinite().all()
