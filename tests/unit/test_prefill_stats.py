# SPDX-License-Identifier: Apache-2.0
"""Sums over prompts, gathered chunk by chunk, against sums over whole prompts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_cache import LAYERS, SCALE, Cache
from planners import planner_of, prompts
from scorer_inputs import hidden_moments, key_attention_sum, query_moments

from vllm_kvcompress.batch import StepRows, plan_sums
from vllm_kvcompress.kernels import PromptPages
from vllm_kvcompress.prefill_stats import PromptSums, SumRows
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import Need

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
        self.sums = PromptSums(LAYERS, self.planner.config.needs)
        self.done = [0] * len(cache.facts)
        self.checked = 0

    def step(self, chunks: dict[int, int]) -> None:
        """The next tokens of some requests; ``chunks`` says how many."""
        cache, requests = self.cache, list(chunks)
        lens = np.array(list(chunks.values()))
        rows = StepRows(
            req_ids=[f"r{i}" for i in requests],
            slots=np.array(requests),
            fresh=np.zeros(len(requests), dtype=bool),
            prompt_lens=np.array([cache.facts[i].length for i in requests]),
            num_computed=np.array([self.done[i] for i in requests]),
            query_lens=lens,
            query_starts=np.cumsum(lens) - lens,
            plans=[self.planner.plan(cache.facts[i]) for i in requests],
        )
        spans = [(i, slice(self.done[i], self.done[i] + chunks[i])) for i in requests]
        for i in requests:
            self.done[i] += chunks[i]
        plan = plan_sums(rows)
        if not plan.rows.size:
            return
        ending = np.flatnonzero(rows.ends_prompt[plan.rows])
        sums = self.sum_rows(rows, plan, ending)
        for layer in range(LAYERS):
            total = self.add(layer, sums, spans)
            for entry, row in enumerate(plan.rows[ending]):
                self.check(layer, requests[row], entry, total)
        self.sums.discard([rows.req_ids[row] for row in plan.rows[ending]])

    def sum_rows(self, rows: StepRows, plan, ending: np.ndarray) -> SumRows:
        width = int(plan.lengths.max())
        index = np.arange(width) - width + plan.lengths[:, None]
        blocks = -(-int((plan.positions + plan.lengths).max()) // BLOCK_SIZE)
        table = self.cache.block_table[rows.slots[plan.rows], :blocks].long()
        tokens = np.where(index >= 0, plan.starts[:, None] + index, 0)
        store = self.sums.rows([rows.req_ids[i] for i in plan.rows])
        arrays = store, tokens, plan.lengths, plan.positions, plan.lengths - plan.skip
        return SumRows(*map(torch.from_numpy, arrays), table, torch.from_numpy(ending))

    def add(self, layer: int, sums: SumRows, spans: list[tuple[int, slice]]):
        """One layer's rows of the step; the totals of prompts that end."""
        cache = self.cache

        def batch(name: str) -> torch.Tensor:
            rows = [getattr(cache.prompts[i], name)[layer][..., span, :] for i, span in spans]
            return torch.from_numpy(np.concatenate(rows, axis=-2)).transpose(0, -2)

        if self.need is Need.KEY_ATTENTION_SUMS:
            pages = PromptPages(cache.pages(layer), sums.block_table, 2, cache.layout)
            return self.sums.add_columns(sums, layer, batch("q"), pages, SCALE, 0.0)
        if self.need is Need.HIDDEN_MOMENTS:
            return self.sums.add_hidden(sums, layer, batch("hidden"))
        return self.sums.add_queries(sums, layer, batch("raw"))

    def check(self, layer: int, request: int, entry: int, total) -> None:
        prompt, scorer = self.cache.prompts[request], self.planner.config.scoring
        self.checked += 1
        if self.need is Need.KEY_ATTENTION_SUMS:
            expected = key_attention_sum(prompt.q[layer], prompt.k[layer], SCALE)
            found = total[entry]
            np.testing.assert_allclose(found[:, : prompt.length], expected, rtol=2e-5, atol=1e-6)
            assert found[:, prompt.length :].eq(0).all()
            return
        moments = hidden_moments if self.need is Need.HIDDEN_MOMENTS else query_moments
        rows = prompt.hidden if self.need is Need.HIDDEN_MOMENTS else prompt.raw
        expected = moments(rows[layer], scorer)
        for name, value in vars(expected).items():
            found = getattr(total, name)[entry]
            torch.testing.assert_close(found, value.to(found.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("need", PLANNERS, ids=lambda need: need.name)
@given(data=st.data())
def test_chunks_add_up_to_whole_prompts(need, data):
    """Several requests in chunks of any size, with rows of the store handed on."""
    facts = data.draw(st.lists(prompts(40), min_size=1, max_size=4))
    replay = Replay(need, Cache.random(facts, BLOCK_SIZE, seed=len(facts)))
    while any(done < fact.length for done, fact in zip(replay.done, facts, strict=True)):
        left = {i: f.length - replay.done[i] for i, f in enumerate(facts)}
        open_rows = [i for i, count in left.items() if count]
        chosen = data.draw(st.lists(st.sampled_from(open_rows), min_size=1, unique=True))
        replay.step({i: data.draw(st.integers(1, left[i])) for i in chosen})
    compressing = sum(replay.planner.plan(fact).compresses for fact in facts)
    assert replay.checked == LAYERS * compressing


def test_a_request_that_comes_back_starts_over():
    """Preempted inside its prompt, it leaves nothing behind, whoever gets its row."""
    cache = Cache.random([PromptFacts(30), PromptFacts(25)], BLOCK_SIZE, seed=1)
    replay = Replay(Need.KEY_ATTENTION_SUMS, cache)
    replay.step({0: 17, 1: 5})
    replay.sums.discard(["r0"])
    replay.done[0] = 0
    replay.step({1: 20})
    replay.step({0: 30})
    assert replay.checked == 2 * LAYERS


def test_only_what_is_needed_is_summed():
    assert not PromptSums(LAYERS, Need.KEYS | Need.WINDOW_QUERIES | Need.SEGMENTS)
    for need in PLANNERS:
        assert PromptSums(LAYERS, Need.KEYS | need)
