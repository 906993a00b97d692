# SPDX-License-Identifier: Apache-2.0
"""How a step's tokens are cut up, against naive models."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from planners import planner_of, prompts

from vllm_kvcompress.batch import (
    StepBatch,
    head_major_order,
    plan_stats,
    query_runs,
    ranges,
)
from vllm_kvcompress.prompt import PromptFacts

PLANNER = planner_of(4, method="snapkv", window=6, budget=8)
PLANNERS = [
    PLANNER,
    planner_of(4, method="postvision", window=6, budget=8),  # rows by the length of the text
    planner_of(4, method="expected+uniform", window=6, budget=8),  # moments without the sinks
    planner_of(4, method="shiftkv", window=6, budget=8, stat_ctx=13),  # of the last tokens
    planner_of(4, method="h2o", window=6, budget=8),
]


def step_batch(requests, planner=PLANNER) -> StepBatch:
    """A step from (id, prompt, C, q) of each request; a prompt is facts or a length."""
    ids, prompts, computed, query_lens = zip(*requests, strict=True)
    facts = [p if isinstance(p, PromptFacts) else PromptFacts(p) for p in prompts]
    plans = [planner.plan(fact) for fact in facts]
    query_lens = np.array(query_lens)
    return StepBatch(
        req_ids=ids,
        slots=np.arange(len(ids)),
        compressed=np.zeros(len(ids), dtype=bool),
        plans=[plan if plan.compresses else None for plan in plans],
        num_computed=np.array(computed),
        query_lens=query_lens,
        query_starts=np.cumsum(query_lens) - query_lens,
    )


request_facts = st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(1, 30))


@given(st.lists(request_facts, min_size=1, max_size=6), st.sampled_from(PLANNERS))
def test_chunks_that_matter(facts, planner):
    """Prompt tokens of requests with a plan, where a method looks at one of them."""
    batch = step_batch([(str(i), *fact) for i, fact in enumerate(facts)], planner)
    expected = []
    for i, (prompt_len, computed, query_len) in enumerate(facts):
        plan = planner.plan(PromptFacts(prompt_len))
        positions = range(computed, computed + query_len)
        in_prompt = [p for p in positions if p < prompt_len and plan.compresses]
        if any(p >= plan.first_row for p in in_prompt):
            token = sum(fact[2] for fact in facts[:i])
            expected.append((i, token, computed, in_prompt[-1] + 1, plan))
    assert batch.chunks() == expected


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
    """A planner, prompts, cached prefixes, and in every step some of them with some tokens each."""
    planner = draw(st.sampled_from(PLANNERS))
    facts = draw(st.lists(prompts(45), min_size=1, max_size=5))
    done = [
        draw(st.integers(0, plan.max_hit // planner.block_size)) * planner.block_size
        for plan in map(planner.plan, facts)
    ]
    ends = [fact.length + 2 for fact in facts]  # two decode tokens each
    steps = []
    while any(c < end for c, end in zip(done, ends, strict=True)):
        unfinished = [i for i, c in enumerate(done) if c < ends[i]]
        chosen = draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        step = []
        for i in chosen:
            left = facts[i].length - done[i]
            query_len = draw(st.integers(1, left)) if left > 0 else 1
            step.append((f"r{i}", facts[i], done[i], query_len))
            done[i] += query_len
        steps.append(step)
    return planner, facts, steps


@given(chunked_prompts())
def test_every_row_that_is_looked_at_is_kept_once(case):
    """Replays prompts in chunks, with positions standing in for queries."""
    planner, facts, steps = case
    kept: dict[str, dict[int, int]] = {f"r{i}": {} for i in range(len(facts))}
    for step in steps:
        batch = step_batch(step, planner)
        positions = [p for _, _, c, q in step for p in range(c, c + q)]
        for owner, token, count, distance in query_runs(batch.chunks()):
            of_owner = kept[batch.req_ids[owner]]
            assert count > 0
            for i in range(count):
                away = distance + count - 1 - i
                assert 0 <= away < planner.config.max_rows
                assert away not in of_owner
                of_owner[away] = positions[token + i]
    for i, fact in enumerate(facts):
        plan = planner.plan(fact)
        num_rows = plan.num_rows if plan.compresses else 0
        assert kept[f"r{i}"] == {d: fact.length - 1 - d for d in range(num_rows)}


@given(chunked_prompts())
def test_stats_take_in_every_prompt_token_once(case):
    planner, facts, steps = case
    first: dict[str, int] = {}
    seen: dict[str, list[int]] = {f"r{i}": [] for i in range(len(facts))}
    counted: dict[str, list[int]] = {req_id: [] for req_id in seen}
    for step in steps:
        batch = step_batch(step, planner)
        positions = [p for _, _, c, q in step for p in range(c, c + q)]
        groups = plan_stats(batch.chunks())
        assert all(chunks.lengths.max() < 2 * chunks.lengths.min() for chunks in groups)
        rows = [row for chunks in groups for row in zip(*chunks, strict=True)]
        for owner, start, length, position, count in rows:
            req_id = batch.req_ids[owner]
            taken = positions[start : start + length]
            assert taken[0] == position
            assert 0 <= count <= length
            seen[req_id] += taken
            counted[req_id] += taken[length - count :]
        for req_id, fact, computed, query_len in step:
            if computed + query_len > planner.plan(fact).first_row:
                first.setdefault(req_id, computed)
    for i, fact in enumerate(facts):
        plan, req_id = planner.plan(fact), f"r{i}"
        if not plan.compresses or plan.first_row == fact.length:
            assert not seen[req_id]
            continue
        assert seen[req_id] == list(range(first[req_id], fact.length))
        start = max(plan.moments_from, first[req_id])
        assert counted[req_id] == list(range(start, fact.length))
        assert plan.stats_from >= fact.length or start == plan.moments_from


def test_replayed_outputs_share_a_chunk_with_the_end_of_the_prompt():
    """A preempted request that had not been compressed comes back with prompt and outputs."""
    batch = step_batch([("a", 20, 16, 9), ("b", 30, 30, 1)])
    [chunk] = chunks = batch.chunks()
    assert chunk[:4] == (0, 0, 16, 20)
    assert query_runs(chunks) == [(0, 0, 4, 0)]
    [stats] = plan_stats(chunks)
    assert [part.tolist() for part in stats] == [[0], [0], [4], [16], [0]]


def test_prompts_of_one_step_look_at_different_rows():
    planner = PLANNERS[1]
    image = [PromptFacts(40, ((0, end),)) for end in (38, 35)]
    batch = step_batch([("a", image[0], 30, 10), ("b", image[1], 36, 4)], planner)
    assert query_runs(batch.chunks()) == [(0, 8, 2, 0), (1, 10, 4, 0)]
