# SPDX-License-Identifier: Apache-2.0
"""Operations on float8 pages against their definitions on the numbers that those stand for."""

import pytest
import torch
from kept_cases import HEADS, LAYER_PAGES, kept_tokens
from prompt_cases import row_scales

from vllm_kvcompress.kernels import (
    PageLayout,
    PromptPages,
    as_stored,
    column_attention,
    compaction,
    elite_rows,
    native,
    prompt_rows,
    proxy_attention,
    reference,
    window_attention,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NAN = float("nan")
SCALES = {"key_scale": row_scales(0.37, 3), "value_scale": row_scales(1.9, 3)}
SCALE = row_scales(0.2, 3)
# ends of prompts, query heads, KV heads, D, block size
SHAPE = ([1, 70, 200], 6, 2, 48, 16)

pytestmark = pytest.mark.parametrize("dtype", FLOAT8, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(params=["rows", "strewn"])
def prompts(request, dtype) -> PromptPages:
    """Prompts in the layouts of GPUs and of CPUs, NaN in whatever belongs to nobody."""
    if request.param == "strewn":
        request.getfixturevalue("cpp")
    return make_prompts(dtype, strewn=request.param == "strewn")


def make_prompts(dtype: torch.dtype, strewn: bool) -> PromptPages:
    ends, _, num_kv_heads, head_size, size = SHAPE
    generator = torch.Generator().manual_seed(1)
    numel, num_blocks = size * head_size, -(-max(ends) // size)
    order = [torch.randperm(numel, generator=generator) + part * numel for part in (0, 1)]
    layout = PageLayout(size, head_size, *(order if strewn else ()))
    shape = ((1 + len(ends) * num_blocks) * num_kv_heads, 2 * numel)
    pages = 4 * torch.randn(shape, generator=generator)
    pages[:num_kv_heads] = NAN  # nobody's block
    table = 1 + torch.randperm(len(ends) * num_blocks, generator=generator).view(-1, num_blocks)
    for row, end in enumerate(ends):
        if end % size:
            stale = torch.cat(reference.index_tables(layout, pages.device), 1)[end % size :]
            last = int(table[row, end // size]) * num_kv_heads
            pages[last : last + num_kv_heads, stale.flatten()] = NAN
        table[row, -(-end // size) :] = 0
    return PromptPages(pages.to(dtype), table, num_kv_heads, layout, **SCALES)


def as_numbers(prompts: PromptPages) -> PromptPages:
    """The same prompts in float32 pages, where no scale is needed."""
    keys, values = reference.index_tables(prompts.layout, prompts.pages.device)
    pages = prompts.pages.float()
    heads = torch.arange(prompts.num_kv_heads)
    for row, end in enumerate(SHAPE[0]):
        used = prompts.block_table[row, : -(-end // SHAPE[4])]
        own = (used[:, None] * prompts.num_kv_heads + heads).flatten()[:, None]
        pages[own, keys.flatten()] *= SCALES["key_scale"][row]
        pages[own, values.flatten()] *= SCALES["value_scale"][row]
    return prompts._replace(pages=pages, key_scale=None, value_scale=None)


def rows_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N, count, Hq, D]."""
    ends, num_q_heads, _, head_size, _ = SHAPE
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(ends), count, num_q_heads, head_size, generator=generator).to(dtype)


def on_device(prompts: PromptPages) -> PromptPages:
    pages, table = prompts.pages.clone().to(DEVICE), prompts.block_table.to(DEVICE)
    scales = {name: scale.to(DEVICE) for name, scale in SCALES.items()}
    return prompts._replace(pages=pages, block_table=table, **scales)


@pytest.mark.parametrize("part", ["key", "value"])
def test_reading(prompts, part):
    expected = reference.read_prompt(as_numbers(prompts), part)
    found = [reference.read_prompt(prompts, part)]
    if prompts.layout.key_index is None:
        rows = prompt_rows.read_prompt(on_device(prompts), part).cpu()
        # Triton's interpreter takes the bits of a float8 NaN for a number
        found.append(rows.masked_fill(expected.isnan(), NAN))
    else:
        found.append(native.read_prompt(prompts, part))
    for rows in found:
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_window_scores(prompts, precision, softcap):
    """16-bit queries hold every float8 number, so that products stay exact."""
    queries, lens = rows_of(1, precision), torch.tensor(SHAPE[0])
    keys = reference.read_prompt(as_numbers(prompts), "key")
    expected = reference.window_scores(queries, keys, lens, SCALE, softcap)
    if prompts.layout.key_index is None:
        found = window_attention.window_scores(
            queries.to(DEVICE), on_device(prompts), lens.to(DEVICE), SCALE.to(DEVICE), softcap
        )
    else:
        found = native.window_scores(queries, prompts, lens, SCALE, softcap)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_key_attention_sum(prompts, precision):
    queries, ends = rows_of(33, precision), torch.tensor(SHAPE[0])
    lengths = torch.tensor([1, 33, 20])
    arguments = (queries, lengths, ends - lengths)
    keys = reference.read_prompt(as_numbers(prompts), "key").nan_to_num(0.0)
    expected = reference.key_attention_sum(*arguments, keys, SCALE)
    if prompts.layout.key_index is None:
        on = (tensor.to(DEVICE) for tensor in arguments)
        found = column_attention.key_attention_sum(*on, on_device(prompts), SCALE.to(DEVICE))
    else:
        found = native.key_attention_sum(*arguments, prompts, SCALE)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=1e-6)


def test_proxies_and_elite(dtype):
    prompts, lens = make_prompts(dtype, strewn=False), torch.tensor(SHAPE[0])
    keys = reference.read_prompt(as_numbers(prompts), "key")
    queries, on = rows_of(4), on_device(prompts)
    expected = reference.group_attention_sum(queries, keys, lens, 2, SCALE)
    found = proxy_attention.group_attention_sum(
        queries.to(DEVICE), on, lens.to(DEVICE), 2, SCALE.to(DEVICE)
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=1e-6)

    instruction_len = torch.tensor([1, 3, 4])
    expected = reference.last_row_logits(queries, keys, lens, instruction_len, SCALE)
    found = elite_rows.last_row_logits(
        queries.to(DEVICE), on, lens.to(DEVICE), instruction_len.to(DEVICE), SCALE.to(DEVICE)
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", [reference, compaction])
def test_compaction_moves_bits(dtype, implementation):
    """NaN and both zeros included; scales play no part."""
    case = kept_tokens(PageLayout(16, 24), torch.uint8)
    tables = (case.kept, case.count, case.start)
    expected = case.staged.clone()
    reference.stage_tokens(case.rows, *tables, expected)
    rows = case.rows._replace(pages=case.rows.pages.view(dtype), **SCALES)
    staged = case.staged.clone().view(dtype).to(DEVICE)
    implementation.stage_tokens(_moved(rows), *(t.to(DEVICE) for t in tables), staged)
    assert staged.cpu().view(torch.uint8).equal(expected)

    prompts = case.prompts._replace(pages=case.prompts.pages.clone())
    reference.write_pages(prompts, expected, *case.numbers, LAYER_PAGES)
    written = _moved(case.prompts._replace(pages=case.prompts.pages.view(dtype)))
    numbers = (numbers.to(DEVICE) for numbers in case.numbers)
    implementation.write_pages(written, staged, *numbers, LAYER_PAGES)
    assert written.pages.cpu().view(torch.uint8)[HEADS:].equal(prompts.pages[HEADS:])


def _moved(prompts: PromptPages) -> PromptPages:
    pages, table = prompts.pages.clone().to(DEVICE), prompts.block_table.to(DEVICE)
    return prompts._replace(pages=pages, block_table=table)


def test_what_was_read_is_stored_as_it_was(prompts):
    """A merge hands back the entries that it leaves alone."""
    read = [reference.read_prompt(prompts, part)[:, :, :70] for part in ("key", "value")]
    bare = prompts._replace(key_scale=None, value_scale=None)
    entries = reference.read_prompt(bare, "key")[:, :, :70]
    stored = as_stored(prompts, *read)
    assert stored.dtype == prompts.pages.dtype
    # the second is as long as that
    assert stored[1, ..., : SHAPE[3]].float().equal(entries[1])


def test_storing_rounds_and_saturates(dtype):
    scales = (torch.tensor([0.5]), torch.tensor([2.0]))
    prompts = PromptPages(
        torch.empty(0, dtype=dtype), torch.empty(0), 1, PageLayout(16, 4), *scales
    )
    limit, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    keys = torch.tensor([1.0, 1.0 + 0.6 * step, 1e9, -float("inf")])
    values = torch.tensor([1.0, 1.0 + 0.4 * step, -1e9, NAN])
    stored = as_stored(prompts, keys.view(1, 1, 1, 4), values.view(1, 1, 1, 4)).float()
    expected = torch.tensor([2, 2 + 2 * step, limit, -limit, 0.5, 0.5, -limit, NAN])
    torch.testing.assert_close(stored.flatten(), expected, rtol=0, atol=0, equal_nan=True)
