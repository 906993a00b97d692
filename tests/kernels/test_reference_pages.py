# SPDX-License-Identifier: Apache-2.0
"""The reference operations on head pages against naive loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.kernels.reference import (
    PageLayout,
    PromptPages,
    read_prompt,
    stage_tokens,
    write_pages,
)
from vllm_kvcompress.kernels.reference_decode import HeldPages, head_page_tables

seeds = st.integers(0, 2**32 - 1)


def page_layout(block_size, head_size, rng) -> PageLayout:
    """Elements of keys and values strewn over the page, as no kernel would do it."""
    order = torch.from_numpy(rng.permutation(block_size * 2 * head_size))
    return PageLayout(block_size, head_size, *order.view(2, -1))


def element(layout: PageLayout, part: int, token: int, d: int) -> int:
    """Offset of an element inside its page; part 0 is the key."""
    index = (layout.key_index, layout.value_index)[part]
    if index is None:
        return (token * 2 + part) * layout.head_size + d
    return int(index[token * layout.head_size + d])


class TestReadPrompt:
    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize("part", ["key", "value"])
    def test_against_loops(self, part, permuted):
        rng = np.random.default_rng(0)
        size, head_size, heads = 3, 4, 2
        layout = page_layout(size, head_size, rng) if permuted else PageLayout(size, head_size)
        pages = torch.randn(7 * heads, size * 2 * head_size)
        table = torch.tensor([[5, 2, 6], [1, 0, 0]])
        got = read_prompt(PromptPages(pages, table, heads, layout), part)
        assert got.shape == (2, heads, 9, head_size)
        for n, h, t, d in np.ndindex(*got.shape):
            page = pages[int(table[n, t // size]) * heads + h]
            offset = element(layout, ("key", "value").index(part), t % size, d)
            assert got[n, h, t, d] == page[offset]


@st.composite
def compactions(draw):
    """Layers, heads, and requests of m full blocks, n kept ones and the pages of each head.

    The n * layers * heads pages of a request are split at random over its layers and heads.
    """
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        full = draw(st.integers(2, 9))
        kept = draw(st.integers(1, full - 1))
        total, runs = kept * layers * heads, layers * heads
        cuts = draw(st.lists(st.integers(0, total), min_size=runs - 1, max_size=runs - 1))
        counts = [b - a for a, b in itertools.pairwise([0, *sorted(cuts), total])]
        if max(counts) > full:  # a head has no more pages than the prompt
            counts = [kept] * runs
        requests.append((full, kept, counts))
    flags = draw(st.booleans()), draw(st.booleans())
    return layers, heads, requests, *flags, draw(st.sampled_from([1, 2, 4])), draw(seeds)


def draw_kept(rng, counts, full, size):
    """Ascending positions of every head, page_count * block_size of them."""
    return [
        np.sort(rng.choice(full * size, count * size, replace=False)).tolist() for count in counts
    ]


class TestCompaction:
    @given(compactions())
    def test_against_loops(self, case):
        """Staging layers together or one after another, then writing everything at once."""
        layers, heads, requests, permuted, in_one, size, seed = case
        rng, head_size, num = np.random.default_rng(seed), 3, len(requests)
        layout = page_layout(size, head_size, rng) if permuted else PageLayout(size, head_size)
        num_blocks = 1 + sum(full for full, _, _ in requests)
        layer_pages = num_blocks * heads
        shape = (layers * layer_pages, size * 2 * head_size)
        pages = torch.from_numpy(rng.normal(size=shape))
        before = pages.clone()
        ids = rng.permutation(np.arange(1, num_blocks)).tolist()
        longest = max(full for full, _, _ in requests)
        tables = [[ids.pop() for _ in range(full)] for full, _, _ in requests]
        table = torch.tensor([table + [0] * (longest - len(table)) for table in tables])
        kept = [draw_kept(rng, counts, full, size) for full, _, counts in requests]
        counts = torch.tensor([counts for _, _, counts in requests])
        starts = counts.cumsum(1) - counts
        max_kept = int(counts.max()) * size
        positions = torch.tensor(
            [[row + [longest * size] * (max_kept - len(row)) for row in rows] for rows in kept]
        )
        # of rows, layer by layer
        positions, row_counts, row_starts = (
            part.unflatten(1, (layers, heads)).transpose(0, 1).flatten(0, 1)
            for part in (positions, counts, starts)
        )
        shifted = (table + torch.arange(layers)[:, None, None] * num_blocks).flatten(0, 1)
        prompts = PromptPages(pages, shifted, heads, layout)
        staged = pages.new_full((num, int(counts.sum(1).max()) + 1, shape[1]), np.nan)
        groups = [slice(None)] if in_one else [slice(i * num, i * num + num) for i in range(layers)]
        for rows in groups:
            stage_tokens(
                prompts._replace(block_table=shifted[rows]),
                positions[rows],
                row_counts[rows],
                row_starts[rows],
                staged,
            )
        for i, total in enumerate(counts.sum(1).tolist()):
            assert not staged[i, :total].isnan().any()
            assert staged[i, total:].isnan().all(), "pages that nobody owns are left alone"
        write_pages(
            prompts._replace(block_table=table),
            staged,
            counts.sum(1),
            torch.tensor([full for full, _, _ in requests]),
            torch.tensor([num_kept for _, num_kept, _ in requests]),
            layer_pages,
        )

        expected = before.clone()
        for (full, num_kept, counts), table, rows in zip(requests, tables, kept, strict=True):
            number = 0
            for run, row in enumerate(rows):
                layer, head = divmod(run, heads)
                for page in range(counts[run]):
                    target_layer, within = divmod(number, num_kept * heads)
                    target = table[full - num_kept + within % num_kept] * heads + within // num_kept
                    target += target_layer * layer_pages
                    number += 1
                    for token in range(size):
                        position = row[page * size + token]
                        source = layer * layer_pages + table[position // size] * heads + head
                        for part, d in np.ndindex(2, head_size):
                            value = before[source, element(layout, part, position % size, d)]
                            expected[target, element(layout, part, token, d)] = value
        # the null block takes what nobody reads
        assert pages[heads:].equal(expected[heads:])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8])
    def test_elements_move_bit_for_bit(self, dtype):
        """NaN payloads included: a cache may hold packed types."""
        bits = torch.randint(0, 256, (4, 2 * 2 * 4 * dtype.itemsize), dtype=torch.uint8)
        pages = bits.clone().view(dtype)
        prompts = PromptPages(pages, torch.tensor([[1, 2, 3]]), 1, PageLayout(2, 4))
        one, staged = torch.tensor([[1]]), pages.new_empty((1, 1, 16))
        stage_tokens(prompts, torch.tensor([[[1, 4]]]), one, one - 1, staged)
        write_pages(prompts, staged, one[0], torch.tensor([3]), torch.tensor([1]), 4)
        moved, rows = pages.view(torch.uint8)[3].view(2, -1), bits.view(4, 2, -1)
        assert moved[0].equal(rows[1, 1])
        assert moved[1].equal(rows[3, 0])


@st.composite
def page_tables(draw):
    """Rows (m, n, pages of each layer and head, length) with and without compression."""
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    runs, rows = layers * heads, []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            rows.append((0, 1, [0] * runs, draw(st.integers(0, 40))))
            continue
        full = draw(st.integers(2, 9))
        kept = draw(st.integers(1, full - 1))
        counts = [kept] * runs
        for _ in range(draw(st.integers(0, 4))):
            giver, taker = draw(st.integers(0, runs - 1)), draw(st.integers(0, runs - 1))
            if giver != taker and counts[giver] > 0 and counts[taker] < full:
                counts[giver], counts[taker] = counts[giver] - 1, counts[taker] + 1
        rows.append((full, kept, counts, full * 4 + draw(st.integers(0, 9))))
    return layers, heads, rows, draw(seeds)


class TestHeadPageTables:
    @given(page_tables())
    def test_against_loops(self, case):
        layers, heads, rows, seed = case
        size = 4
        num_blocks = 1 + max(-(-length // size) for *_, length in rows)
        block_table = np.random.default_rng(seed).permutation(len(rows) * num_blocks)
        block_table = torch.from_numpy(block_table).int().view(len(rows), num_blocks)
        layer_pages = block_table.numel() * heads
        columns = [list(column) for column in zip(*rows, strict=True)]
        full, kept, counts, lengths = (torch.tensor(c, dtype=torch.int32) for c in columns)
        width = num_blocks + 2
        starts = (counts.cumsum(1) - counts).int()
        counts, starts = (
            pages.view(len(rows), layers, heads).transpose(0, 1) for pages in (counts, starts)
        )
        slots = torch.arange(len(rows))
        held = HeldPages(slots, full, kept, counts, starts, 0, layer_pages if layers > 1 else 0)
        tables = torch.full((layers, len(rows) * heads, width), -1, dtype=torch.int32)
        kv_lens = torch.zeros(layers, len(rows) * heads, dtype=torch.int32)
        head_page_tables(tables, kv_lens, block_table, lengths, held, size)
        number = [0] * len(rows)
        for layer in range(layers):
            own = slice(layer * heads, (layer + 1) * heads)
            table, kv_len = tables[layer], kv_lens[layer]
            for i, (num_full, num_kept, pages, length) in enumerate(rows):
                for head, count in enumerate(pages[own]):
                    expected = []
                    for _ in range(count):
                        owner, within = divmod(number[i], num_kept * heads)
                        block = int(block_table[i, num_full - num_kept + within % num_kept])
                        expected.append(owner * layer_pages + block * heads + within // num_kept)
                        number[i] += 1
                    for b in range(num_full, -(-length // size)):
                        page = int(block_table[i, b]) * heads + head
                        expected.append(layer * layer_pages + page)
                    row = i * heads + head
                    assert kv_len[row] == length - num_full * size + count * size
                    used = -(-int(kv_len[row]) // size)
                    assert table[row, :used].tolist() == expected
                    assert (table[row, used:] == -1).all(), "past the length nothing is written"

    def test_padding_rows_have_no_tokens(self):
        """Rows of a full graph without a request."""
        one = torch.ones(1, dtype=torch.int32)
        table, kv_len = torch.full((1, 2, 3), 9).int(), torch.full((1, 2), 9).int()
        pages = torch.tensor([[[2, 2]]], dtype=torch.int32), torch.tensor([[[0, 2]]]).int()
        held = HeldPages(torch.tensor([0]), 5 * one, 2 * one, *pages)
        blocks = torch.tensor([[7, 3]], dtype=torch.int32)
        head_page_tables(table, kv_len, blocks, 0 * one, held, 4)
        assert kv_len.tolist() == [[0, 0]]
        assert (table == 9).all()
