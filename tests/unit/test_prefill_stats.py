# SPDX-License-Identifier: Apache-2.0
"""Sums over prompts, gathered chunk by chunk, against sums over whole prompts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from paged_cache import LAYERS, SCALE, Cache
from planners import planner_of, prompts
from torch.utils._pytree import tree_leaves

from vllm_kvcompress.batch import ChunkStats, StepBatch, plan_stats
from vllm_kvcompress.kernels import PageLayout, PromptPages
from vllm_kvcompress.prefill_stats import PrefillStats, StatsRows, bytes_per_token
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.request_slots import RequestSlots
from vllm_kvcompress.scoring import Need
from vllm_kvcompress.testing.inputs import hidden_moments, key_attention_sum, query_moments

BLOCK_SIZE = 4
SETTINGS = {"window": 6, "budget": 8}
PLANNERS = {
    Need.KEY_ATTENTION_SUMS: planner_of(BLOCK_SIZE, method="h2o+uniform", **SETTINGS),
    Need.HIDDEN_MOMENTS: planner_of(BLOCK_SIZE, method="shiftkv", stat_ctx=13, **SETTINGS),
    Need.QUERY_MOMENTS: planner_of(BLOCK_SIZE, method="expected+uniform", **SETTINGS),
}


class Replay:
    """Prompts of a cache that run in chunks, as a builder and its layers would see them."""

    def __init__(self, need: Need, cache: Cache) -> None:
        self.need, self.cache, self.planner = need, cache, PLANNERS[need]
        num = len(cache.facts)
        max_length = cache.block_table.shape[1] * BLOCK_SIZE
        self.stats = PrefillStats(LAYERS, num, max_length, self.planner.config.needs)
        self.entries = RequestSlots(num)
        self.done = [0] * num
        self.checked = 0

    def step(self, chunks: dict[int, int]) -> None:
        """The next tokens of some requests; ``chunks`` says how many."""
        cache, requests = self.cache, list(chunks)
        lens = np.array(list(chunks.values()))
        plans = [self.planner.plan(cache.facts[i]) for i in requests]
        batch = StepBatch(
            req_ids=[f"r{i}" for i in requests],
            slots=np.array(requests),
            compressed=np.zeros(len(requests), dtype=bool),
            plans=[plan if plan.compresses else None for plan in plans],
            num_computed=np.array([self.done[i] for i in requests]),
            query_lens=lens,
            query_starts=np.cumsum(lens) - lens,
        )
        spans = [(i, slice(self.done[i], self.done[i] + chunks[i])) for i in requests]
        for i in requests:
            self.done[i] += chunks[i]
        looked_at = batch.chunks()
        groups = [self.stats_rows(batch, group) for group in plan_stats(looked_at)]
        for layer in range(LAYERS):
            for rows in groups:
                self.add(layer, rows, spans)
        ended = [requests[c.owner] for c in looked_at if c.end == c.plan.facts.length]
        for request in ended:  # alone, and its entry goes to whoever comes next
            self.check(request)
            self.entries.release([f"r{request}"])

    def stats_rows(self, batch: StepBatch, plan: ChunkStats) -> StatsRows:
        width = int(plan.lengths.max())
        index = np.arange(width) - width + plan.lengths[:, None]
        blocks = -(-int((plan.positions + plan.lengths).max()) // BLOCK_SIZE)
        table = self.cache.block_table[batch.slots[plan.owner], :blocks].long()
        tokens = np.where(index >= 0, plan.starts[:, None] + index, 0)
        req_ids = [batch.req_ids[i] for i in plan.owner]
        self.stats.clear(torch.from_numpy(self.entries.assign(req_ids)))
        entries = self.entries.of(req_ids)
        arrays = entries, tokens, plan.lengths, plan.positions, plan.counted
        return StatsRows(*map(torch.from_numpy, arrays), table)

    def add(self, layer: int, rows: StatsRows, spans: list[tuple[int, slice]]) -> None:
        """One layer's tokens of the step."""
        cache = self.cache

        def batch(name: str) -> torch.Tensor:
            parts = [getattr(cache.prompts[i], name)[layer][..., span, :] for i, span in spans]
            return torch.from_numpy(np.concatenate(parts, axis=-2)).transpose(0, -2)

        if self.need is Need.KEY_ATTENTION_SUMS:
            pages = PromptPages(cache.pages(layer), rows.block_table, 2, cache.layout)
            scale = torch.full((len(rows.entries),), SCALE)
            self.stats.add_keys(rows, layer, batch("q"), pages, scale, 0.0)
        elif self.need is Need.HIDDEN_MOMENTS:
            self.stats.add_hidden(rows, layer, batch("hidden"))
        else:
            self.stats.add_queries(rows, layer, batch("raw"))

    def check(self, request: int) -> None:
        prompt, scorer = self.cache.prompts[request], self.planner.config.scoring
        self.checked += 1
        totals = self.stats.totals(torch.from_numpy(self.entries.of([f"r{request}"])), self.need)
        (found,) = totals.values()
        for layer in range(LAYERS):
            if self.need is Need.KEY_ATTENTION_SUMS:
                expected = key_attention_sum(prompt.q[layer], prompt.k[layer], SCALE)
                sums = found[layer, 0]
                got = sums[:, : prompt.length]
                np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
                assert sums[:, prompt.length :].eq(0).all()
                continue
            moments = hidden_moments if self.need is Need.HIDDEN_MOMENTS else query_moments
            rows = prompt.hidden if self.need is Need.HIDDEN_MOMENTS else prompt.raw
            for name, value in moments(rows[layer], scorer)._asdict().items():
                part = getattr(found, name)[layer]
                torch.testing.assert_close(part, value.to(part.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("need", PLANNERS, ids=lambda need: need.name)
@given(data=st.data())
def test_chunks_add_up_to_whole_prompts(need, data):
    """Several requests in chunks of any size, with entries handed on."""
    facts = data.draw(st.lists(prompts(40), min_size=1, max_size=4))
    replay = Replay(need, Cache.random(facts, BLOCK_SIZE, seed=len(facts)))
    while any(done < fact.length for done, fact in zip(replay.done, facts, strict=True)):
        left = {i: f.length - replay.done[i] for i, f in enumerate(facts)}
        unfinished = [i for i, count in left.items() if count]
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        replay.step({i: data.draw(st.integers(1, left[i])) for i in chosen})
    compressing = sum(replay.planner.plan(fact).compresses for fact in facts)
    assert replay.checked == compressing


def test_a_request_that_comes_back_starts_over():
    """Preempted inside its prompt, it leaves nothing behind, whoever gets its entry."""
    cache = Cache.random([PromptFacts(30), PromptFacts(25)], BLOCK_SIZE, seed=1)
    replay = Replay(Need.KEY_ATTENTION_SUMS, cache)
    replay.step({0: 17, 1: 5})
    replay.entries.release(["r0"])
    replay.done[0] = 0
    replay.step({1: 20})
    replay.step({0: 30})
    assert replay.checked == 2


def test_prompts_of_several_entries_are_read_layer_by_layer():
    """Rows of moments are (layer, prompt) pairs, in the order of the entries asked for."""
    needs = Need.QUERY_MOMENTS
    stats = PrefillStats(LAYERS, 4, 8, needs)
    rows = StatsRows(
        entries=torch.tensor([3, 1]),
        tokens=torch.tensor([[0, 1], [0, 2]]),
        lengths=torch.tensor([2, 1]),
        positions=torch.tensor([4, 7]),
        counted=torch.tensor([1, 1]),
        block_table=torch.zeros(2, 1, dtype=torch.long),
    )
    for layer in range(LAYERS):
        queries = torch.arange(3.0)[:, None, None].expand(3, 2, 2) + 10 * layer
        stats.add_queries(rows, layer, queries)
    found = stats.totals(torch.tensor([1, 3]), needs)["moments"]
    expected = [10 * layer + token for layer in range(LAYERS) for token in (2, 1)]
    assert found.total[:, 0, 0].tolist() == expected
    assert found.num_tokens.tolist() == [1] * 2 * LAYERS
    stats.set_positions(rows, torch.tensor([[5], [6], [9]]))
    assert stats.last_positions(torch.tensor([1, 3])).tolist() == [9, 6]


@pytest.mark.parametrize("need", PLANNERS, ids=lambda need: need.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_takes_is_counted(monkeypatch, need, dtype):
    """An upper bound for each padded token, beside the sums, and not a wild one."""
    heads, size, hidden, blocks = 4, 16, 48, 64
    num, width = 3, blocks * BLOCK_SIZE
    stats = PrefillStats(1, num, width, need)
    lens = torch.full((num,), width)
    rows = StatsRows(
        entries=torch.arange(num),
        tokens=torch.arange(num * width).view(num, width),
        lengths=lens,
        positions=torch.zeros_like(lens),
        counted=lens,
        block_table=torch.arange(num * blocks).view(num, blocks),
    )
    queries = torch.zeros(num * width, heads, size, dtype=dtype)
    inputs = torch.full((num * width, hidden), 2.0, dtype=dtype)
    cache = torch.zeros(num * blocks * heads, 2 * BLOCK_SIZE * size)
    pages = PromptPages(cache, rows.block_table, heads, PageLayout(BLOCK_SIZE, size))

    def add() -> None:
        if need is Need.KEY_ATTENTION_SUMS:
            stats.add_keys(rows, 0, queries, pages, torch.ones(num), 0.0)
        elif need is Need.HIDDEN_MOMENTS:
            stats.add_hidden(rows, 0, inputs)
        else:
            stats.add_queries(rows, 0, queries)

    add()  # makes room for the sums
    with LiveBytes(monkeypatch) as live:
        add()
    each = bytes_per_token(
        need, num_heads=heads, head_size=size, hidden_size=hidden, element_size=dtype.itemsize
    )
    sums = stats.totals(rows.entries[:1], need)
    (of_one,) = [sum(t.nbytes for t in tree_leaves(part)) for part in sums.values()]
    bound = num * (width * each + 2 * of_one)
    assert live.peak <= bound <= 3 * live.peak
    assert inputs.eq(2).all(), "the model goes on with them"


def test_only_what_is_needed_is_gathered():
    assert not PrefillStats(LAYERS, 1, 8, Need.KEYS | Need.WINDOW_QUERIES | Need.SEGMENTS)
    for need in PLANNERS:
        assert PrefillStats(LAYERS, 1, 8, Need.KEYS | need)
