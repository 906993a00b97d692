# SPDX-License-Identifier: Apache-2.0
"""What a plan knows of a prompt, against masks of single tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planners import prompts

from vllm_kvcompress.prompt import MAX_TEXT_ROWS, PromptFacts


def mask_of(facts: PromptFacts) -> np.ndarray:
    mask = np.zeros(facts.length, dtype=bool)
    for start, end in facts.visual:
        mask[start:end] = True
    return mask


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=6))
def test_runs_in_any_order_are_joined(spans):
    facts = PromptFacts.from_runs(50, [(start, start + size) for start, size in spans])
    expected = np.zeros(50, dtype=bool)
    for start, size in spans:
        expected[start : start + size] = True
    assert (mask_of(facts) == expected).all()
    for (_, end), (start, _) in zip(facts.visual, facts.visual[1:], strict=False):
        assert end < start
    assert hash(facts) == hash(PromptFacts(50, facts.visual))


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
    assert facts.num_text_rows(window) == expected


def test_the_bound_on_rows_is_the_published_one():
    assert MAX_TEXT_ROWS == 256


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
    ("runs", "visual"),
    [
        ([], ()),
        ([(5, 7), (1, 3)], ((1, 3), (5, 7))),
        ([(1, 3), (3, 4)], ((1, 4),)),  # rows of one image without anything between them
        ([(1, 9), (2, 3)], ((1, 9),)),
    ],
)
def test_examples(runs, visual):
    assert PromptFacts.from_runs(9, runs).visual == visual
