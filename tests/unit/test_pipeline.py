# SPDX-License-Identifier: Apache-2.0
"""The whole chain on a paged cache: what the page tables show must be what the oracle keeps."""

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import ALLOCATORS
from vllm_kvcompress.pipeline import CompressionPipeline, EndingPrompts, HeadPageState
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.scoring import SCORERS

LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_SIZE = 3, 4, 2, 8
SCALE = HEAD_SIZE**-0.5


@dataclass
class Cache:
    """Random prompts in the head pages of a cache; block 0 is the null block.

    Attributes:
        lengths: prompt tokens of each request.
        q, k, v: [L, H, P, D] of each request.
        pages: of each layer, [num_blocks * Hkv, block_size * 2 * D].
        block_table: [R, B] int32, with room for decode tokens; unused entries are 0.
    """

    lengths: list[int]
    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]
    pages: list[torch.Tensor]
    block_table: torch.Tensor
    block_size: int

    @classmethod
    def random(cls, lengths: list[int], block_size: int, seed: int, extra: int = 0) -> "Cache":
        rng = np.random.default_rng(seed)

        def draw(heads: int, length: int) -> np.ndarray:
            return rng.normal(size=(LAYERS, heads, length, HEAD_SIZE)).astype(np.float32) * 1.5

        q = [draw(NUM_Q_HEADS, length) for length in lengths]
        k, v = ([draw(NUM_KV_HEADS, length) for length in lengths] for _ in range(2))
        needed = [-(-(length + extra) // block_size) for length in lengths]
        ids = rng.permutation(np.arange(1, sum(needed) + 3))  # two blocks belong to nobody
        table = np.zeros((len(lengths), max(needed)), dtype=np.int32)
        for i, count in enumerate(needed):
            table[i, :count], ids = ids[:count], ids[count:]
        shape = (sum(needed) + 3, NUM_KV_HEADS, block_size, 2, HEAD_SIZE)
        pages = []
        for layer in range(LAYERS):
            cache = rng.normal(size=shape).astype(np.float32)  # stale values everywhere else
            for i, length in enumerate(lengths):
                position = np.arange(length)
                block, token = table[i, position // block_size], position % block_size
                cache[block, :, token, 0] = k[i][layer].swapaxes(0, 1)
                cache[block, :, token, 1] = v[i][layer].swapaxes(0, 1)
            pages.append(torch.from_numpy(cache).view(shape[0] * NUM_KV_HEADS, -1))
        return cls(lengths, q, k, v, pages, torch.from_numpy(table), block_size)

    def read(self, layer: int, table: torch.Tensor, kv_len: int) -> np.ndarray:
        """[kv_len, 2, D] of one virtual sequence."""
        rows = self.pages[layer][table.long()].view(-1, 2, HEAD_SIZE)
        return rows[:kv_len].numpy()


def compress(cache: Cache, scorer, allocator, planner: BlockPlanner) -> HeadPageState:
    """Run every layer of the requests whose plan compresses; request i has slot 2 * i."""
    layout = kernels.PageLayout(cache.block_size, HEAD_SIZE)
    state = HeadPageState(
        2 * len(cache.lengths),
        1 if allocator.even else LAYERS,
        NUM_KV_HEADS,
        torch.device("cpu"),
    )
    pipeline = CompressionPipeline(scorer, allocator, planner.window, layout, state)
    plans = {i: planner.plan(length) for i, length in enumerate(cache.lengths)}
    chosen = {i: plan for i, plan in plans.items() if plan.compresses}
    if not chosen:
        return state
    facts = torch.tensor(
        [
            (2 * i, cache.lengths[i], p.budget - planner.window, p.num_full_blocks,
             p.num_kept_blocks, p.tail)
            for i, p in chosen.items()
        ]
    ).T  # fmt: skip
    state.begin(facts[0], facts[3], facts[4], allocator.even)
    longest = max(cache.lengths[i] for i in chosen)
    share = 1 if allocator.even else NUM_KV_HEADS
    batch = EndingPrompts(
        *facts,
        block_table=cache.block_table[list(chosen), : -(-longest // cache.block_size)].long(),
        max_pages=max(min(p.num_kept_blocks * share, p.num_full_blocks) for p in chosen.values()),
    )
    for layer in range(LAYERS):
        queries = torch.stack(
            [
                torch.from_numpy(cache.q[i][layer][:, -planner.window :]).transpose(0, 1)
                for i in chosen
            ]
        )
        count = pipeline.compress(
            batch,
            0 if allocator.even else layer,
            layer,
            queries,
            cache.pages[layer],
            NUM_KV_HEADS,
            SCALE,
            0.0,
        )
        assert (count.sum(1) == batch.num_kept_blocks * NUM_KV_HEADS).all()
    return state


CASES = [
    # block size, window, budget, lengths: odd ones, block ends, and prompts that fit
    (4, 3, 8, [9, 12, 13, 8, 1]),
    (16, 8, 33, [100, 47, 48, 64, 63]),
    (32, 32, 64, [1000, 97, 65, 95]),
    (16, 20, 24, [57, 33, 250]),
    (1, 2, 5, [7, 30]),
]


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
@pytest.mark.parametrize(("block_size", "window", "budget", "lengths"), CASES)
def test_tables_show_what_the_oracle_keeps(scorer, allocator, block_size, window, budget, lengths):
    cache = Cache.random(lengths, block_size, seed=sum(lengths), extra=2 * block_size)
    before = [pages.clone() for pages in cache.pages]
    even = ALLOCATORS[allocator].even
    planner = BlockPlanner(block_size, window, budget)
    state = compress(cache, SCORERS[scorer](), ALLOCATORS[allocator](), planner)
    cfg = oracle.OracleConfig(
        budget=budget, scorer=scorer, allocator=allocator, window=window, block_size=block_size
    )
    slots = 2 * torch.arange(len(lengths))
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    written = torch.zeros(len(before[0]), dtype=torch.bool)
    for i, length in enumerate(lengths):
        plan = planner.plan(length)
        if plan.compresses:
            kept = cache.block_table[i, plan.num_freed_blocks : plan.num_full_blocks].long()
            written[(kept[:, None] * NUM_KV_HEADS + torch.arange(NUM_KV_HEADS)).flatten()] = True
    written[:NUM_KV_HEADS] = True  # the null block takes what nobody reads

    for layer in range(LAYERS):
        tables, kv_lens = state.tables(
            0 if even else layer,
            slots,
            cache.block_table,
            seq_lens,
            block_size,
            cache.block_table.shape[1],
        )
        for i, (q, k, v) in enumerate(zip(cache.q, cache.k, cache.v, strict=True)):
            expected = oracle.kept_sets(q, k, cfg, SCALE)[layer]
            for head, positions in enumerate(expected):
                row = i * NUM_KV_HEADS + head
                assert kv_lens[row] == len(positions)
                shown = cache.read(layer, tables[row], int(kv_lens[row]))
                np.testing.assert_array_equal(shown[:, 0], k[layer, head, positions])
                np.testing.assert_array_equal(shown[:, 1], v[layer, head, positions])
        assert cache.pages[layer][~written].equal(before[layer][~written])


@pytest.mark.parametrize("allocator", sorted(ALLOCATORS))
def test_decoding_appends_to_the_tail(allocator):
    """Tokens written by their logical position follow the kept ones in the virtual sequence."""
    block_size, decoded = 4, 7
    lengths = [21, 6, 18]
    cache = Cache.random(lengths, block_size, seed=1, extra=decoded)
    planner = BlockPlanner(block_size, 3, 8)
    state = compress(cache, SCORERS["snapkv"](), ALLOCATORS[allocator](), planner)
    slots = 2 * torch.arange(3)
    prompt = torch.tensor(lengths, dtype=torch.int32)
    width = cache.block_table.shape[1]
    args = slots, cache.block_table
    short, short_lens = state.tables(0, *args, prompt, block_size, width)
    long, long_lens = state.tables(0, *args, prompt + decoded, block_size, width)
    assert long_lens.equal(short_lens + decoded)
    marks = np.arange(2 * HEAD_SIZE, dtype=np.float32).reshape(2, HEAD_SIZE)
    for i, length in enumerate(lengths):
        for head in range(NUM_KV_HEADS):
            row = i * NUM_KV_HEADS + head
            kept = cache.read(0, short[row], int(short_lens[row])).copy()
            for position in range(length, length + decoded):
                block = int(cache.block_table[i, position // block_size])
                page = cache.pages[0][block * NUM_KV_HEADS + head].view(block_size, 2, HEAD_SIZE)
                page[position % block_size] = torch.from_numpy(marks + position)
            shown = cache.read(0, long[row], int(long_lens[row]))
            np.testing.assert_array_equal(shown[: len(kept)], kept)
            new = np.stack([marks + p for p in range(length, length + decoded)])
            np.testing.assert_array_equal(shown[len(kept) :], new)


def test_together_as_alone():
    """A request's outcome does not depend on who else ends its prompt in the step."""
    lengths = [50, 129, 77]
    planner = BlockPlanner(16, 8, 40)
    scorer, allocator = SCORERS["bacon"](), ALLOCATORS["adakv"]()
    together = Cache.random(lengths, 16, seed=3)
    alone = [Cache.random(lengths, 16, seed=3) for _ in lengths]
    state = compress(together, scorer, allocator, planner)
    for i, cache in enumerate(alone):
        one = Cache(
            lengths[i : i + 1],
            cache.q[i : i + 1],
            cache.k[i : i + 1],
            cache.v[i : i + 1],
            cache.pages,
            cache.block_table[i : i + 1],
            16,
        )
        its_state = compress(one, scorer, allocator, planner)
        for layer in range(LAYERS):
            facts = [
                s.tables(layer, torch.tensor([slot]), one.block_table,
                         torch.tensor(lengths[i : i + 1], dtype=torch.int32), 16, 6)
                for s, slot in ((state, 2 * i), (its_state, 0))
            ]  # fmt: skip
            (tables, kv_lens), (its_tables, its_lens) = facts
            assert kv_lens.equal(its_lens)
            for row, kv_len in enumerate(kv_lens.tolist()):
                np.testing.assert_array_equal(
                    together.read(layer, tables[row], kv_len),
                    one.read(layer, its_tables[row], kv_len),
                )


class TestHeadPageState:
    def test_a_slot_that_was_never_used_shows_the_natural_table(self):
        state = HeadPageState(3, 2, NUM_KV_HEADS, torch.device("cpu"))
        table = torch.tensor([[4, 7, 2]], dtype=torch.int32)
        tables, kv_len = state.tables(
            1, torch.tensor([3]), table, torch.tensor([9], dtype=torch.int32), 4, 3
        )
        assert tables.tolist() == [[8, 14, 4], [9, 15, 5]]
        assert kv_len.tolist() == [9, 9]

    def test_even_pages_are_known_before_the_layers_run(self):
        state = HeadPageState(3, 1, NUM_KV_HEADS, torch.device("cpu"))
        state.begin(torch.tensor([0, 2]), torch.tensor([5, 0]), torch.tensor([2, 1]), even=True)
        assert state.page_count[0].tolist() == [[2, 2], [0, 0], [0, 0], [0, 0]]
        assert state.page_start[0].tolist() == [[0, 2], [0, 0], [0, 0], [0, 0]]

    def test_a_new_request_in_an_old_slot_starts_over(self):
        state = HeadPageState(3, 2, NUM_KV_HEADS, torch.device("cpu"))
        slots = torch.tensor([1, 2])
        state.begin(slots, torch.tensor([5, 6]), torch.tensor([2, 3]), even=False)
        for layer in (0, 1):
            state.set_pages(layer, slots, torch.tensor([[1, 3], [4, 2]]))
        assert state.page_start[:, slots].tolist() == [[[0, 1], [0, 4]]] * 2
        state.begin(slots[:1], torch.tensor([0]), torch.tensor([1]), even=False)
        assert state.page_count[:, 1].eq(0).all()
        assert state.num_full_blocks.tolist() == [0, 0, 6, 0]
        assert state.num_kept_blocks.tolist() == [1, 1, 3, 1]
        assert state.page_count[:, 2].tolist() == [[4, 2], [4, 2]]
