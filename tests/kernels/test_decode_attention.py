# SPDX-License-Identifier: Apache-2.0
"""Decode attention over head pages: definition and Triton against a loop over heads."""

from typing import NamedTuple

import pytest
import torch
from experiments import decode_attention, paged_decode

from vllm_kvcompress.kernels import HeldPages, PageLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """A decode step, and what each head holds by the words of the documentation.

    Attributes:
        queries: [R, Hq, D]; ``args`` are those of ``definition`` after them, but for the scale.
        held_rows: per request and KV head, keys and values [kv_len, 2 * D] in order.
    """

    queries: torch.Tensor
    args: tuple
    held_rows: list[list[torch.Tensor]]


def draw_case(
    counts: list[list[int] | None],
    num_full: int,
    tokens: int,
    group: int,
    head_size: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    layer: int = 0,
    num_layers: int = 1,
) -> Case:
    """Requests whose heads hold so many compacted pages; None: not compressed.

    A compressed one wrote ``num_full`` blocks, of which those that its pages fill stay, and
    ``tokens`` more since; an uncompressed one wrote ``tokens``. Slots that no head holds are NaN.
    """
    generator = torch.Generator().manual_seed(head_size + size)
    heads = next(len(row) for row in counts if row is not None)
    tail_blocks, num = -(-tokens // size), len(counts)
    width = num_full + tail_blocks + 2
    layer_pages = (num * width + 1) * heads
    pages = torch.full((num_layers * layer_pages, size, 2 * head_size), float("nan"))
    blocks = (torch.randperm(num * width, generator=generator) + 1).view(num, width).int()
    slots = torch.randperm(num + 2, generator=generator)[:num]
    full, kept = torch.zeros(num + 2).int(), torch.ones(num + 2).int()
    count = torch.zeros(num + 2, heads).int()
    start = torch.zeros(num + 2, heads).int()
    table = torch.zeros_like(blocks)  # block 0 is nobody's
    seq_lens = torch.zeros(num, dtype=torch.int32)
    held_rows = []
    for row, pages_of in enumerate(counts):
        slot, m, n = int(slots[row]), 0, 0
        if pages_of is not None:
            first = 0 if num_layers == 1 else heads  # runs begin somewhere among all layers' pages
            m, n = num_full, -(-(first + sum(pages_of)) // (heads * num_layers))
            full[slot], kept[slot] = m, n
            count[slot] = torch.tensor(pages_of)
            start[slot] = first + count[slot].cumsum(0) - count[slot]
        table[row, m - n : m + tail_blocks] = blocks[row, m - n : m + tail_blocks]
        seq_lens[row] = m * size + tokens
        held_rows.append([])
        for head in range(heads):
            ids = []
            for number in range(int(start[slot, head]), int(start[slot, head] + count[slot, head])):
                owner, within = divmod(number, n * heads)
                block = int(blocks[row, m - n + within % n])
                ids.append(owner * layer_pages + block * heads + within // n)
            for i in range(tail_blocks):
                ids.append(layer * layer_pages + int(blocks[row, m + i]) * heads + head)
            length = int(count[slot, head]) * size + tokens
            rows = 2 * torch.randn(length, 2 * head_size, generator=generator)
            rows = rows.to(dtype).float()
            for page, part in zip(ids, rows.split(size), strict=False):
                pages[page, : len(part)] = part
            held_rows[-1].append(rows)
    queries = torch.randn(num, heads * group, head_size, generator=generator).to(dtype)
    spans = layer_pages if num_layers > 1 else 0
    state = (slots, full, kept, count[None], start[None])
    held = HeldPages(*(t.to(DEVICE) for t in state), layer, spans)
    args = (
        pages.view(len(pages), -1).to(dtype).to(DEVICE), PageLayout(size, head_size),
        table.to(DEVICE), seq_lens.to(DEVICE), held,
    )  # fmt: skip
    return Case(queries.to(DEVICE), args, held_rows)


def attend(case: Case, scale: float, softcap: float = 0.0) -> torch.Tensor:
    """[R, Hq, D] float64, head by head."""
    out = torch.zeros(case.queries.shape, dtype=torch.float64)
    for row, heads in enumerate(case.held_rows):
        group = out.shape[1] // len(heads)
        for head, held in enumerate(heads):
            keys, values = held.double().chunk(2, dim=1)
            mine = slice(head * group, (head + 1) * group)
            logits = case.queries[row, mine].cpu().double() @ keys.T * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            out[row, mine] = logits.softmax(1) @ values
    return out


FUNCTIONS = pytest.mark.parametrize(
    "function", [paged_decode.definition, decode_attention.paged_decode]
)
RAGGED = [[5, 1, 0], None, [0, 0, 6]]


@FUNCTIONS
@pytest.mark.parametrize(
    ("group", "head_size", "size", "tokens", "softcap"),
    [
        (1, 64, 16, 1, 0.0),
        (4, 80, 32, 37, 2.0),
        (7, 128, 16, 33, 0.0),
        (7, 64, 32, 32, 2.0),
        (1, 128, 16, 0, 2.0),
        (4, 128, 32, 300, 0.0),
    ],
)
def test_equals_attention_over_what_is_held(function, group, head_size, size, tokens, softcap):
    case = draw_case(RAGGED, 9, tokens, group, head_size, size)
    scale = head_size**-0.5
    found = function(case.queries, *case.args, scale, softcap)
    expected = attend(case, scale, softcap).float()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@FUNCTIONS
def test_pages_in_other_layers(function):
    case = draw_case([[5, 9, 4], None], 9, 20, 2, 64, 16, layer=1, num_layers=3)
    found = function(case.queries, *case.args, 0.2)
    torch.testing.assert_close(found.cpu(), attend(case, 0.2).float(), rtol=1e-5, atol=1e-5)


@FUNCTIONS
def test_nothing_held_gives_zeros(function):
    """Padding rows of a graph, and a head without a page in a request without a tail."""
    case = draw_case([[3, 0], [2, 2]], 6, 0, 2, 64, 16)
    pages, layout, table, seq_lens, held = case.args
    seq_lens[1] = 0
    found = function(case.queries, pages, layout, table, seq_lens, held, 0.2).cpu()
    assert (found[0, 2:] == 0).all()
    assert (found[1] == 0).all()
    torch.testing.assert_close(found[0, :2], attend(case, 0.2)[0, :2].float(), rtol=1e-5, atol=1e-5)


def test_no_requests():
    case = draw_case(RAGGED, 9, 5, 2, 64, 16)
    pages, layout, table, seq_lens, held = case.args
    held = held._replace(slots=held.slots[:0])
    out = decode_attention.paged_decode(
        case.queries[:0], pages, layout, table[:0], seq_lens[:0], held, 0.2
    )
    assert out.shape == (0, 6, 64)


@pytest.mark.parametrize("most", [1, 2, 128])
def test_any_number_of_splits(monkeypatch, most):
    """Splits longer than the fewest tokens, a last one that is not full, more than are joined at
    once, and a single one."""
    monkeypatch.setattr(decode_attention, "_MOST_SPLITS", most)
    case = draw_case([[130, 3], [1, 150]], 160, 9, 4, 64, 16)
    found = decode_attention.paged_decode(case.queries, *case.args, 0.3)
    torch.testing.assert_close(found.cpu(), attend(case, 0.3).float(), rtol=1e-5, atol=1e-5)


# Triton's interpreter cannot multiply bfloat16
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16][: 1 + (DEVICE == "cuda")])
def test_16_bits(dtype):
    """No further from the truth than twice what torch is with the same type."""
    case = draw_case(RAGGED, 9, 37, 7, 128, 16, dtype)
    scale = 128**-0.5
    found = decode_attention.paged_decode(case.queries, *case.args, scale)
    assert found.dtype == dtype
    exact = attend(case, scale)
    error = (found.cpu().double() - exact).abs().max()
    rounded = torch.zeros_like(exact)
    for row, heads in enumerate(case.held_rows):
        for head, held in enumerate(heads):
            keys, values = held.to(dtype).chunk(2, dim=1)
            mine = slice(7 * head, 7 * head + 7)
            probs = (case.queries[row, mine].cpu() @ keys.T * scale).softmax(1)
            rounded[row, mine] = (probs @ values).double()
    assert error <= 2 * (rounded - exact).abs().max() + 1e-5


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_float8_pages(function, dtype, precision):
    """Numbers that float8 holds, each part with a scale."""
    case = draw_case(RAGGED, 9, 37, 4, 64, 16, dtype)
    key_scale, value_scale = 0.37, 1.9
    pages, layout, *others = case.args
    queries = case.queries.to(precision)
    found = function(
        queries, pages, layout, *others, 0.2, key_scale=key_scale, value_scale=value_scale
    )
    assert found.dtype == precision
    scales = torch.tensor([key_scale, value_scale]).repeat_interleave(64)
    scaled = [[rows * scales for rows in heads] for heads in case.held_rows]
    expected = attend(case._replace(queries=queries, held_rows=scaled), 0.2).float()
    tolerance = 1e-5 if precision == torch.float32 else 4e-3
    torch.testing.assert_close(found.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def test_split_plan():
    """Work for all of a large GPU from a few heads; splits of like size where heads are unlike."""
    for num_seqs in (1, 4, 32, 64, 128, 1024, 8192):
        splits, tokens = decode_attention.split_plan(num_seqs, 1 << 17)
        assert tokens % 64 == 0
        assert num_seqs * splits <= max(2 * 4096, 16 * num_seqs)
        # a head of 8k tokens among heads of 2k: its splits stay within twice theirs
        assert 8192 / splits <= 2 * max(tokens, 2048 / splits)
    assert decode_attention.split_plan(4, 100) == (2, 64)
