# SPDX-License-Identifier: Apache-2.0
"""Block plans: what scheduler and workers must agree on for every prompt length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.plan import BlockPlanner


@st.composite
def planners(draw):
    """Planners that pass the checks at start: budget > window and budget >= block size."""
    block_size = draw(st.sampled_from([1, 8, 16, 32, 128]))
    window = draw(st.integers(1, 100))
    if draw(st.booleans()):
        ratio = draw(st.floats(0, 1, exclude_min=True))
        return BlockPlanner(block_size, window, budget_ratio=ratio)
    least = max(window + 1, block_size)
    return BlockPlanner(block_size, window, budget_tokens=draw(st.integers(least, least + 500)))


lengths = st.integers(0, 5000)


@given(planners(), lengths)
def test_blocks_add_up(planner, length):
    plan = planner.plan(length)
    assert plan.num_full_blocks * planner.block_size + plan.tail == length
    assert 0 <= plan.tail < planner.block_size
    assert 0 <= plan.num_kept_blocks <= plan.num_full_blocks
    assert plan.num_freed_blocks + plan.num_kept_blocks == plan.num_full_blocks
    assert plan.compresses == (plan.num_freed_blocks > 0)


@given(planners(), lengths)
def test_kept_tokens_never_fall_below_the_budget(planner, length):
    """Rounding to whole pages adds less than a block."""
    plan = planner.plan(length)
    kept = plan.num_kept_blocks * planner.block_size + plan.tail
    if plan.compresses:
        assert plan.budget <= kept <= plan.budget + planner.block_size - 1
        assert plan.num_kept_blocks >= 1
    else:
        assert kept == length


@given(planners(), lengths)
def test_compaction_only_touches_recomputed_blocks(planner, length):
    """No hit covers the observation window or a block that compaction writes."""
    plan = planner.plan(length)
    if plan.compresses:
        assert plan.max_hit % planner.block_size == 0
        assert plan.max_hit <= length - planner.window
        assert plan.max_hit == plan.num_freed_blocks * planner.block_size
    else:
        assert plan.max_hit == max(length - 1, 0)


@given(planners(), lengths)
def test_a_prompt_within_its_budget_is_left_alone(planner, length):
    plan = planner.plan(length)
    if plan.budget >= length:
        assert not plan.compresses
    if length <= planner.window:
        assert not plan.compresses


@given(planners(), lengths)
def test_capacity_leaves_something_to_drop(planner, length):
    """Allocators rely on 1 <= capacity <= n for prompts that compress."""
    plan = planner.plan(length)
    if plan.compresses:
        assert 1 <= plan.budget - planner.window <= length - planner.window


@given(planners(), lengths)
def test_equal_planners_agree(planner, length):
    twin = BlockPlanner(
        planner.block_size, planner.window, planner.budget_tokens, planner.budget_ratio
    )
    assert twin.plan(length) == planner.plan(length)


@given(planners(), lengths, lengths)
def test_longer_prompts_keep_at_least_as_many_blocks_and_free_no_fewer(planner, one, two):
    short, long = sorted((one, two))
    first, second = planner.plan(short), planner.plan(long)
    if planner.budget_tokens is not None:
        assert first.num_freed_blocks <= second.num_freed_blocks
    assert first.budget <= second.budget


@pytest.mark.parametrize(
    ("length", "full", "kept", "tail", "max_hit"),
    [
        (1201, 37, 2, 17, 1120),  # 64 + 17 kept, the window reaches 15 tokens into the last block
        (128, 4, 2, 0, 64),
        (96, 3, 2, 0, 32),
        (95, 2, 2, 31, 94),
        (64, 2, 2, 0, 63),
        (10, 0, 0, 10, 9),
    ],
)
def test_examples(length, full, kept, tail, max_hit):
    plan = BlockPlanner(block_size=32, window=32, budget_tokens=64).plan(length)
    assert (plan.num_full_blocks, plan.num_kept_blocks, plan.tail) == (full, kept, tail)
    assert plan.max_hit == max_hit
    assert plan.budget == 64


def test_ratio_is_rounded_up_and_never_below_window_or_block():
    planner = BlockPlanner(block_size=16, window=32, budget_ratio=0.1)
    assert planner.budget_for(1001) == 101
    assert planner.budget_for(100) == 33
    assert BlockPlanner(128, 32, budget_ratio=0.1).budget_for(100) == 128
