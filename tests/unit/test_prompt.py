# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a prompt, against masks of single tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planners import prompts

from vllm_kvcompress.prompt import MAX_INSTRUCTION_LEN, PromptFacts, split_evenly


def mask_of(facts: PromptFacts) -> np.ndarray:
    mask = np.zeros(facts.length, dtype=bool)
    for start, end in facts.visual:
        mask[start:end] = True
    return mask


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 4), st.randoms())
def test_items_in_any_order(sizes, num_items, random):
    """Runs of several items, with a token of text after each run."""
    starts = [sum(sizes[:i]) + i for i in range(len(sizes))]
    owners = sorted(random.randrange(num_items) for _ in sizes)
    items = [
        [
            (start, start + size)
            for start, size, owner in zip(starts, sizes, owners, strict=True)
            if owner == item
        ]
        for item in range(num_items)
    ]
    shuffled = [random.sample(item, len(item)) for item in random.sample(items, len(items))]
    facts = PromptFacts.from_items(100, shuffled)
    order = {owner: rank for rank, owner in enumerate(dict.fromkeys(owners))}
    expected = np.full(100, -1)
    for start, size, owner in zip(starts, sizes, owners, strict=True):
        expected[start : start + size] = order[owner]
    assert facts.segments(100).tolist() == expected.tolist()
    assert (mask_of(facts)[:100] == (expected >= 0)[: len(mask_of(facts))]).all()
    assert hash(facts) == hash(PromptFacts.from_items(100, items))


@pytest.mark.parametrize(
    ("runs", "parts", "expected"),
    [
        ([(3, 9)], 1, [[(3, 9)]]),
        ([(3, 9)], 3, [[(3, 5)], [(5, 7)], [(7, 9)]]),
        ([(0, 2), (5, 9)], 2, [[(0, 2), (5, 6)], [(6, 9)]]),  # text inside a patch
        ([(0, 2), (5, 7)], 2, [[(0, 2)], [(5, 7)]]),  # text between patches
    ],
)
def test_split_evenly(runs, parts, expected):
    assert split_evenly(runs, parts) == expected


@given(prompts(60), st.integers(0, 70))
def test_visual_tokens_below_a_position(facts, end):
    assert facts.num_visual(end) == mask_of(facts)[:end].sum()


@given(prompts(700), st.integers(1, 100))
def test_rows_of_the_instruction(facts, window):
    visual = np.flatnonzero(mask_of(facts))
    if not len(visual):
        expected = min(window, facts.length)
    elif visual[-1] == facts.length - 1:
        expected = 1
    else:
        expected = min(facts.length - 1 - visual[-1], 256)
    assert facts.num_instruction_tokens(window) == expected


def test_the_bound_on_rows_is_the_published_one():
    assert MAX_INSTRUCTION_LEN == 256


@given(prompts(60), st.integers(0, 20))
def test_segments(facts, padding):
    segments = facts.segments(facts.length + padding)
    expected = [-1] * (facts.length + padding)
    for index, (start, end) in enumerate(facts.visual):
        for position in range(start, end):
            expected[position] = index
    assert segments.tolist() == expected
    assert segments.dtype == np.int64


@pytest.mark.parametrize(
    ("runs", "width", "expected"),
    [
        ([(3, 15)], 4, [3, 15, 4, 4]),
        ([(3, 7), (8, 12), (13, 17)], 4, [3, 17, 4, 5]),  # a separator behind each row
        ([(3, 15)], 0, None),
        ([(3, 15)], 5, None),  # no whole rows
        ([(3, 7), (8, 12), (14, 18)], 4, None),  # rows at unlike distances
        ([(3, 7), (8, 11)], 4, None),
        ([(3, 9), (20, 26)], 3, None),  # two rows, text, and two more
    ],
)
def test_grids(runs, width, expected):
    """First position, end, width and step; 0 where tokens do not stand row by row."""
    facts = PromptFacts.from_items(40, [runs, [(30, 36)]], [width, 3])
    lines = facts.grids(3)
    assert lines[0].tolist() == (expected or [0] * 4)
    assert lines[1].tolist() == [30, 36, 3, 3]
    assert lines[2].tolist() == [0] * 4
    for index in range(2):
        first, end, wide, step = lines[index]
        if step:
            places = np.arange(first, end)
            inside = places[(places - first) % step < wide]
            assert inside.tolist() == np.flatnonzero(facts.segments(40) == index).tolist()


def test_widths_follow_their_items():
    """Whatever the order in which they are named; runs of one's own count as items."""
    facts = PromptFacts.from_items(40, [[(20, 30)], [], [(2, 14)]], [5, 7, 4])
    assert facts.grids(2)[:, 2].tolist() == [4, 5]
    assert PromptFacts(40, ((2, 14), (20, 30)), widths=(4, 5)).grids(2).tolist() == (
        facts.grids(2).tolist()
    )
    assert PromptFacts.from_items(40, [[(2, 14)]], [0]) == PromptFacts.from_items(40, [[(2, 14)]])
    assert not PromptFacts(40).grids(1).any()
