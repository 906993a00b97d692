# SPDX-License-Identifier: Apache-2.0
"""How a step's rows are cut up, against naive models."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.batch import StepRows, head_major_order, plan_windows, ranges
from vllm_kvcompress.plan import BlockPlanner

PLANNER = BlockPlanner(block_size=4, window=6, budget_tokens=8)


def step_rows(rows, planner=PLANNER) -> StepRows:
    """A step from (request, P, C, q) of each row."""
    ids, prompt_lens, computed, query_lens = zip(*rows, strict=True)
    query_lens = np.array(query_lens)
    return StepRows(
        req_ids=ids,
        slots=np.arange(len(ids)),
        fresh=np.zeros(len(ids), dtype=bool),
        prompt_lens=np.array(prompt_lens),
        num_computed=np.array(computed),
        query_lens=query_lens,
        query_starts=np.cumsum(query_lens) - query_lens,
        plans=[planner.plan(length) for length in prompt_lens],
    )


row_facts = st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(1, 30))


@given(st.lists(row_facts, min_size=1, max_size=6))
def test_parts_of_a_row(facts):
    """Positions before P belong to the prompt part, the others to the decode part."""
    rows = step_rows([(str(i), *fact) for i, fact in enumerate(facts)])
    for i, (prompt_len, computed, query_len) in enumerate(facts):
        positions = range(computed, computed + query_len)
        in_prompt = [p for p in positions if p < prompt_len]
        assert rows.prompt_part[i] == len(in_prompt)
        assert rows.decode_part[i] == query_len - len(in_prompt)
        assert rows.ends_prompt[i] == (prompt_len - 1 in positions)
        assert rows.compresses[i] == PLANNER.plan(prompt_len).compresses


pairs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=6)


@given(pairs)
def test_ranges(spans):
    starts, lengths = (np.array([s[i] for s in spans], dtype=np.int64) for i in (0, 1))
    expected = [p for start, length in spans for p in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected


@given(pairs, st.integers(1, 4))
def test_head_major_order(spans, num_heads):
    starts, lengths = (np.array([s[i] for s in spans], dtype=np.int64) for i in (0, 1))
    expected = []
    for start, length in spans:
        for head in range(num_heads):
            for token in range(start, start + length):
                expected.append(token * num_heads + head)
    assert head_major_order(starts, lengths, num_heads).tolist() == expected


@st.composite
def chunked_prompts(draw):
    """Prompt lengths, cached prefixes, and in every step some rows with some tokens each."""
    lengths = draw(st.lists(st.integers(1, 45), min_size=1, max_size=5))
    done = [
        draw(st.integers(0, plan.max_hit // PLANNER.block_size)) * PLANNER.block_size
        for plan in map(PLANNER.plan, lengths)
    ]
    steps = []
    while any(c < p + 2 for c, p in zip(done, lengths, strict=True)):  # two decode tokens each
        open_rows = [i for i, c in enumerate(done) if c < lengths[i] + 2]
        chosen = draw(st.lists(st.sampled_from(open_rows), min_size=1, unique=True))
        step = []
        for i in chosen:
            left = lengths[i] - done[i]
            query_len = draw(st.integers(1, left)) if left > 0 else 1
            step.append((f"r{i}", lengths[i], done[i], query_len))
            done[i] += query_len
        steps.append(step)
    return lengths, steps


@given(chunked_prompts())
def test_every_window_row_is_delivered_once(case):
    """Replays prompts in chunks, with positions standing in for queries."""
    lengths, steps = case
    window = PLANNER.window
    store: dict[tuple[str, int], int] = {}
    delivered = set()
    for step in steps:
        rows = step_rows(step)
        positions = [p for _, _, c, q in step for p in range(c, c + q)]
        ending = np.flatnonzero(rows.ends_prompt & rows.compresses)
        plan = plan_windows(rows, ending, window)
        for row, window_row, token in zip(*plan.save, strict=True):
            key = (rows.req_ids[row], int(window_row))
            assert rows.compresses[row]
            assert key not in store
            store[key] = positions[token]

        assert plan.tokens.shape == (len(ending), window)
        got = np.array([[positions[t] for t in tokens] for tokens in plan.tokens])
        for entry, window_row, row in zip(*plan.load, strict=True):
            assert row == ending[entry]
            got[entry, window_row] = store.pop((rows.req_ids[row], int(window_row)))
        for entry, row in enumerate(ending):
            prompt_len = rows.prompt_lens[row]
            assert got[entry].tolist() == list(range(prompt_len - window, prompt_len))
            assert rows.req_ids[row] not in delivered
            delivered.add(rows.req_ids[row])
    assert not store
    assert delivered == {
        f"r{i}" for i, length in enumerate(lengths) if PLANNER.plan(length).compresses
    }


def test_replayed_outputs_share_a_row_with_the_end_of_the_prompt():
    """A preempted request comes back with prompt and outputs in one row."""
    rows = step_rows([("a", 20, 16, 9), ("b", 30, 30, 1)])
    assert rows.prompt_part.tolist() == [4, 0]
    assert rows.decode_part.tolist() == [5, 1]
    assert rows.ends_prompt.tolist() == [True, False]
    plan = plan_windows(rows, np.array([0]), 6)
    assert plan.tokens.tolist() == [[0, 0, 0, 1, 2, 3]]
    assert [part.tolist() for part in plan.load] == [[0, 0], [0, 1], [0, 0]]
    assert plan.save[0].size == 0
