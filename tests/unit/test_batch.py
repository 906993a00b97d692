# SPDX-License-Identifier: Apache-2.0
"""How a step's rows are cut up, against naive models."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planners import planner_of, prompts

from vllm_kvcompress.batch import StepRows, head_major_order, plan_rows, plan_sums, ranges
from vllm_kvcompress.prompt import PromptFacts

PLANNER = planner_of(4, method="snapkv", window=6, budget=8)
PLANNERS = [
    PLANNER,
    planner_of(4, method="postvision", window=6, budget=8),  # rows by the length of the text
    planner_of(4, method="expected+uniform", window=6, budget=8),  # sums without the sinks
    planner_of(4, method="shiftkv", window=6, budget=8, stat_ctx=13),  # of the last tokens
    planner_of(4, method="h2o", window=6, budget=8),
]


def step_rows(rows, planner=PLANNER) -> StepRows:
    """A step from (request, prompt, C, q) of each row; a prompt is facts or a length."""
    ids, prompts, computed, query_lens = zip(*rows, strict=True)
    facts = [p if isinstance(p, PromptFacts) else PromptFacts(p) for p in prompts]
    query_lens = np.array(query_lens)
    return StepRows(
        req_ids=ids,
        slots=np.arange(len(ids)),
        fresh=np.zeros(len(ids), dtype=bool),
        prompt_lens=np.array([fact.length for fact in facts]),
        num_computed=np.array(computed),
        query_lens=query_lens,
        query_starts=np.cumsum(query_lens) - query_lens,
        plans=[planner.plan(fact) for fact in facts],
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
        assert rows.compresses[i] == PLANNER.plan(PromptFacts(prompt_len)).compresses


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
    """A planner, prompts, cached prefixes, and in every step some rows with some tokens each."""
    planner = draw(st.sampled_from(PLANNERS))
    facts = draw(st.lists(prompts(45), min_size=1, max_size=5))
    done = [
        draw(st.integers(0, plan.max_hit // planner.block_size)) * planner.block_size
        for plan in map(planner.plan, facts)
    ]
    ends = [fact.length + 2 for fact in facts]  # two decode tokens each
    steps = []
    while any(c < end for c, end in zip(done, ends, strict=True)):
        open_rows = [i for i, c in enumerate(done) if c < ends[i]]
        chosen = draw(st.lists(st.sampled_from(open_rows), min_size=1, unique=True))
        step = []
        for i in chosen:
            left = facts[i].length - done[i]
            query_len = draw(st.integers(1, left)) if left > 0 else 1
            step.append((f"r{i}", facts[i], done[i], query_len))
            done[i] += query_len
        steps.append(step)
    return planner, facts, steps


@given(chunked_prompts())
def test_every_row_that_is_looked_at_is_delivered_once(case):
    """Replays prompts in chunks, with positions standing in for queries."""
    planner, facts, steps = case
    store: dict[tuple[str, int], int] = {}
    delivered = set()
    for step in steps:
        rows = step_rows(step, planner)
        positions = [p for _, _, c, q in step for p in range(c, c + q)]
        ending = np.flatnonzero(rows.ends_prompt & rows.compresses)
        plan = plan_rows(rows, ending)
        for row, store_row, token in zip(*plan.save, strict=True):
            key = (rows.req_ids[row], int(store_row))
            assert rows.compresses[row]
            assert 0 <= store_row < planner.max_rows
            assert key not in store
            store[key] = positions[token]

        width = max((rows.plans[row].num_rows for row in ending), default=0)
        assert plan.tokens.shape == (len(ending), width)
        got = np.array([[positions[t] for t in tokens] for tokens in plan.tokens])
        for entry, column, row, store_row in zip(*plan.load, strict=True):
            assert row == ending[entry]
            got[entry, column] = store.pop((rows.req_ids[row], int(store_row)))
        for entry, row in enumerate(ending):
            prompt_len, asked = rows.prompt_lens[row], rows.plans[row].num_rows
            last = got[entry, width - asked :].tolist()
            assert last == list(range(prompt_len - asked, prompt_len))
            assert rows.req_ids[row] not in delivered
            delivered.add(rows.req_ids[row])
    assert not store
    assert delivered == {f"r{i}" for i, f in enumerate(facts) if planner.plan(f).compresses}


@given(chunked_prompts())
def test_sums_take_in_every_prompt_token_once(case):
    planner, facts, steps = case
    first = {f"r{i}": None for i in range(len(facts))}
    seen: dict[str, list[int]] = {req_id: [] for req_id in first}
    counted: dict[str, list[int]] = {req_id: [] for req_id in first}
    for step in steps:
        rows = step_rows(step, planner)
        positions = [p for _, _, c, q in step for p in range(c, c + q)]
        plan = plan_sums(rows)
        for row, start, length, position, skip in zip(
            plan.rows, plan.starts, plan.lengths, plan.positions, plan.skip, strict=True
        ):
            req_id = rows.req_ids[row]
            taken = positions[start : start + length]
            assert taken[0] == position
            assert 0 <= skip <= length
            seen[req_id] += taken
            counted[req_id] += taken[skip:]
        for req_id, _, computed, _ in step:
            if first[req_id] is None:
                first[req_id] = computed
    for i, fact in enumerate(facts):
        plan, req_id = planner.plan(fact), f"r{i}"
        if not plan.compresses:
            assert not seen[req_id]
            continue
        assert seen[req_id] == list(range(first[req_id], fact.length))
        assert counted[req_id] == list(range(plan.moments_from, fact.length))


def test_replayed_outputs_share_a_row_with_the_end_of_the_prompt():
    """A preempted request comes back with prompt and outputs in one row."""
    rows = step_rows([("a", 20, 16, 9), ("b", 30, 30, 1)])
    assert rows.prompt_part.tolist() == [4, 0]
    assert rows.decode_part.tolist() == [5, 1]
    assert rows.ends_prompt.tolist() == [True, False]
    plan = plan_rows(rows, np.array([0]))
    assert plan.tokens.tolist() == [[0, 0, 0, 1, 2, 3]]
    assert [part.tolist() for part in plan.load] == [[0, 0], [0, 1], [0, 0], [5, 4]]
    assert plan.save[0].size == 0
    sums = plan_sums(rows)
    assert (sums.rows.tolist(), sums.starts.tolist()) == ([0], [0])
    assert (sums.lengths.tolist(), sums.positions.tolist()) == ([4], [16])


def test_prompts_of_one_step_look_at_different_rows():
    """Tokens of the shorter one stand at the right; what is before them is nobody's."""
    planner = PLANNERS[1]
    image = [PromptFacts(40, ((0, end),)) for end in (38, 35)]
    rows = step_rows([("a", image[0], 30, 10), ("b", image[1], 36, 4)], planner)
    plan = plan_rows(rows, np.array([0, 1]))
    assert plan.tokens.tolist() == [[0, 0, 0, 8, 9], [0, 10, 11, 12, 13]]
    assert [part.tolist() for part in plan.load] == [[1], [0], [1], [4]]
