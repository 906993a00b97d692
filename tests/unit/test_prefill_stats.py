# SPDX-License-Identifier: Apache-2.0
"""Statistics over prompts, gathered chunk by chunk, against those of whole prompts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_cache import LAYERS, NUM_KV_HEADS, SCALE, Cache
from planners import planner_of, prompts
from scorer_inputs import hidden_moments, key_attention_sum, query_moments

from vllm_kvcompress.kernels import PromptPages
from vllm_kvcompress.prefill_stats import PrefillStats, StatsRows
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import Need

BLOCK_SIZE, LONGEST, ENTRIES = 4, 40, 6
SETTINGS = {"window": 6, "budget": 8}
PLANNERS = {
    Need.KEY_ATTENTION_SUMS: planner_of(BLOCK_SIZE, method="h2o+uniform", **SETTINGS),
    Need.HIDDEN_MOMENTS: planner_of(BLOCK_SIZE, method="shiftkv", stat_ctx=13, **SETTINGS),
    Need.QUERY_MOMENTS: planner_of(BLOCK_SIZE, method="expected+uniform", **SETTINGS),
}


class Replay:
    """Prompts of a cache that run in chunks, as a builder and its layers would see them.

    Attributes:
        entries: where the statistics of each request are kept.
        done: tokens of each that have run.
    """

    def __init__(self, need: Need, cache: Cache, entries: list[int]) -> None:
        self.need, self.cache, self.entries = need, cache, entries
        self.planner = PLANNERS[need]
        self.stats = PrefillStats(LAYERS, ENTRIES, LONGEST, self.planner.config.needs)
        self.done = [0] * len(cache.facts)

    def step(self, chunks: dict[int, int]) -> None:
        """The next tokens of some requests; ``chunks`` says how many."""
        new = [self.entries[i] for i in chunks if not self.done[i]]
        self.stats.clear(torch.tensor(new, dtype=torch.int64))
        rows = self.rows(chunks)
        spans = [(i, slice(self.done[i], self.done[i] + count)) for i, count in chunks.items()]
        for layer in range(LAYERS):
            self.add(layer, rows, spans)
        for i, count in chunks.items():
            self.done[i] += count

    def rows(self, chunks: dict[int, int]) -> StatsRows:
        requests, lengths = list(chunks), np.array(list(chunks.values()))
        starts, positions = np.cumsum(lengths) - lengths, np.array([self.done[i] for i in requests])
        index = np.arange(lengths.max()) - lengths.max() + lengths[:, None]
        plans = [self.planner.plan(self.cache.facts[i]) for i in requests]
        skip = np.clip(np.array([p.moments_from for p in plans]) - positions, 0, lengths)
        blocks = -(-int((positions + lengths).max()) // BLOCK_SIZE)
        arrays = (
            np.array([self.entries[i] for i in requests]),
            np.where(index >= 0, starts[:, None] + index, 0),
            *(lengths, positions, lengths - skip),
        )
        table = self.cache.block_table[requests, :blocks].long()
        return StatsRows(*map(torch.from_numpy, arrays), table)

    def add(self, layer: int, rows: StatsRows, spans: list[tuple[int, slice]]) -> None:
        def batch(name: str) -> torch.Tensor:
            parts = [getattr(self.cache.prompts[i], name)[layer][..., s, :] for i, s in spans]
            return torch.from_numpy(np.concatenate(parts, axis=-2)).transpose(0, -2)

        if self.need is Need.KEY_ATTENTION_SUMS:
            pages = self.cache.pages(layer)
            where = PromptPages(pages, rows.block_table, NUM_KV_HEADS, self.cache.layout)
            scale = torch.full((len(spans),), SCALE)
            self.stats.add_keys(rows, layer, batch("q"), where, scale, 0.0)
        elif self.need is Need.HIDDEN_MOMENTS:
            self.stats.add_hidden(rows, layer, batch("hidden"))
        else:
            self.stats.add_queries(rows, layer, batch("raw"))

    def check(self, requests: list[int]) -> None:
        """The totals of all layers at once."""
        scorer = self.planner.config.scoring
        entries = torch.tensor([self.entries[i] for i in requests])
        ((name, totals),) = self.stats.totals(entries).items()
        for layer, (n, i) in itertools.product(range(LAYERS), enumerate(requests)):
            prompt = self.cache.prompts[i]
            if name == "key_attention_sum":
                wanted = key_attention_sum(prompt.q[layer], prompt.k[layer], SCALE)
                found = totals[layer, n]
                np.testing.assert_allclose(found[:, : prompt.length], wanted, rtol=2e-5, atol=1e-6)
                assert found[:, prompt.length :].eq(0).all()
                continue
            moments = hidden_moments if name == "hidden" else query_moments
            rows = prompt.hidden if name == "hidden" else prompt.raw
            for found, wanted in zip(totals, moments(rows[layer], scorer), strict=True):
                found = found[layer * len(requests) + n]
                torch.testing.assert_close(found, wanted.to(found.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("need", PLANNERS, ids=lambda need: need.name)
@given(data=st.data())
def test_chunks_add_up_to_whole_prompts(need, data):
    """Several requests in chunks of any size, read together in any order."""
    facts = data.draw(st.lists(prompts(LONGEST), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(ENTRIES)))
    replay = Replay(need, Cache.random(facts, BLOCK_SIZE, seed=len(facts)), order)
    left = {i: fact.length for i, fact in enumerate(facts)}
    while left:
        chosen = data.draw(st.lists(st.sampled_from([*left]), min_size=1, unique=True))
        replay.step({i: data.draw(st.integers(1, left[i])) for i in chosen})
        rest = {i: fact.length - replay.done[i] for i, fact in enumerate(facts)}
        left = {i: count for i, count in rest.items() if count}
    replay.check(data.draw(st.permutations(range(len(facts)))))


def test_a_request_that_comes_back_starts_over():
    """Preempted inside its prompt, it leaves nothing behind, whoever gets its entry."""
    cache = Cache.random([PromptFacts(30), PromptFacts(25)], BLOCK_SIZE, seed=1)
    replay = Replay(Need.KEY_ATTENTION_SUMS, cache, [3, 0])
    replay.step({0: 17, 1: 5})
    replay.done[0] = 0
    replay.step({1: 20})
    replay.step({0: 30})
    replay.check([1, 0])


def test_the_last_position_is_the_largest_component():
    """Under M-RoPE; of requests with fewer tokens than others in the step, too."""
    stats = PrefillStats(LAYERS, ENTRIES, LONGEST, Need.HIDDEN_MOMENTS)
    tokens = torch.tensor([[0, 1, 2], [0, 3, 4]])
    counts = torch.tensor([3, 2])
    rows = StatsRows(torch.tensor([2, 5]), tokens, counts, counts, counts, tokens)
    stats.set_positions(rows, torch.tensor([[9, 9, 9], [1, 1, 1], [4, 7, 5], [2, 2, 2], [3, 1, 0]]))
    assert stats.last_positions(torch.tensor([5, 2])).tolist() == [3, 7]


def test_only_what_is_needed_is_summed():
    nothing = Need.KEYS | Need.WINDOW_QUERIES | Need.SEGMENTS
    assert not PrefillStats(LAYERS, ENTRIES, LONGEST, nothing)
    for need in PLANNERS:
        assert PrefillStats(LAYERS, ENTRIES, LONGEST, Need.KEYS | need)
