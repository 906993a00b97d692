# SPDX-License-Identifier: Apache-2.0
"""Random prompts in the head pages of a cache, and the pipeline at work on them."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import Scope, StaticAllocator
from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.page_state import HeadPageState, PageTables
from vllm_kvcompress.pipeline import CompressionPipeline, FinishedPrefills, LayerStack, PromptBatch
from vllm_kvcompress.plan import BlockPlanner, PromptPlan
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import Need
from vllm_kvcompress.testing.inputs import (
    Prompt,
    hidden_moments,
    key_attention_sum,
    maker_of,
    output_grams,
    query_moments,
    random_prompt,
    stack,
)

LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_SIZE = 3, 4, 2, 8
SCALE = HEAD_SIZE**-0.5


@dataclass
class Cache:
    """Prompts in a cache; block 0 is the null block.

    Attributes:
        facts, prompts: of each request.
        all_pages: [L * layer_pages, block_size * 2 * D], layer after layer.
        block_table: [R, B] int32, with room for decode tokens; unused entries are 0.
    """

    facts: list[PromptFacts]
    prompts: list[Prompt]
    all_pages: torch.Tensor
    block_table: torch.Tensor
    block_size: int

    @classmethod
    def random(
        cls, facts: list[PromptFacts], block_size: int, seed: int, extra: int = 0
    ) -> "Cache":
        """Prompts of random keys with ``extra`` tokens of room; stale values everywhere else."""
        rng = np.random.default_rng(seed)
        prompts = [
            random_prompt(seed + i, fact.length, fact.visual, NUM_Q_HEADS, NUM_KV_HEADS,
                          HEAD_SIZE, LAYERS)
            for i, fact in enumerate(facts)
        ]  # fmt: skip
        needed = [-(-(fact.length + extra) // block_size) for fact in facts]
        ids = rng.permutation(np.arange(1, sum(needed) + 3))  # two blocks belong to nobody
        table = np.zeros((len(facts), max(needed)), dtype=np.int32)
        for i, count in enumerate(needed):
            table[i, :count], ids = ids[:count], ids[count:]
        shape = (LAYERS, sum(needed) + 3, NUM_KV_HEADS, block_size, 2, HEAD_SIZE)
        cache = rng.normal(size=shape).astype(np.float32)
        for i, prompt in enumerate(prompts):
            position = np.arange(prompt.length)
            block, token = table[i, position // block_size], position % block_size
            for layer in range(LAYERS):
                cache[layer, block, :, token, 0] = prompt.k[layer].swapaxes(0, 1)
                cache[layer, block, :, token, 1] = prompt.v[layer].swapaxes(0, 1)
        all_pages = torch.from_numpy(cache).flatten(0, 2).flatten(1)
        return cls(facts, prompts, all_pages, torch.from_numpy(table), block_size)

    def only(self, row: int) -> "Cache":
        """The same cache with one of its requests."""
        one = slice(row, row + 1)
        return Cache(
            self.facts[one], self.prompts[one], self.all_pages, self.block_table[one],
            self.block_size,
        )  # fmt: skip

    @property
    def layer_pages(self) -> int:
        return len(self.all_pages) // LAYERS

    @property
    def layout(self) -> kernels.PageLayout:
        return kernels.PageLayout(self.block_size, HEAD_SIZE)

    def pages(self, layer: int) -> torch.Tensor:
        return self.all_pages[layer * self.layer_pages :][: self.layer_pages]

    def tables(
        self, state: HeadPageState, layer: int, seq_lens: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables [R, Hkv, B] into ``all_pages`` and lengths [R, Hkv] of one layer."""
        rows = range(len(self.facts))
        alike = len(state.page_count) == 1
        row = min(layer, len(state.page_count) - 1)
        (tables,), (kv_lens,) = PageTables(state, self.block_table.shape[1], self.block_size).fill(
            2 * torch.tensor(rows),
            self.block_table,
            torch.tensor(seq_lens, dtype=torch.int32),
            row,
            1,
            0 if alike else self.layer_pages,
        )
        if alike:
            tables = tables + layer * self.layer_pages
        shape = (len(self.facts), NUM_KV_HEADS)
        return tables.view(*shape, -1), kv_lens.view(shape)

    def read(self, table: torch.Tensor, kv_len: torch.Tensor) -> np.ndarray:
        """[kv_len, 2, D] of one sequence of the per-head batch."""
        rows = self.all_pages[table.long()].view(-1, 2, HEAD_SIZE)
        return rows[: int(kv_len)].numpy()


def compress(
    cache: Cache, planner: BlockPlanner, **options
) -> tuple[HeadPageState, CompressionPipeline]:
    """Compress the requests whose plan says so; request i has slot 2 * i.

    ``options`` are those of the pipeline.
    """
    config = planner.config
    uniform = config.allocation.scope is Scope.UNIFORM
    state = HeadPageState(
        2 * len(cache.facts), 1 if uniform else LAYERS, NUM_KV_HEADS, torch.device("cpu")
    )
    pipeline = CompressionPipeline(
        config.scoring, config.allocation, config.merging, config.window, NUM_KV_HEADS,
        cache.layout, state, **options,
    )  # fmt: skip
    plans = {i: planner.plan(fact) for i, fact in enumerate(cache.facts)}
    chosen = {i: plan for i, plan in plans.items() if plan.compresses}
    if not chosen:
        return state, pipeline
    prefills = finished_prefills(cache, planner, chosen)
    count = pipeline.compress(prefills, layer_stack(cache, planner, chosen))
    assert count.shape == (len(chosen), LAYERS, NUM_KV_HEADS)
    total = prefills.batch.num_kept_blocks * NUM_KV_HEADS
    assert count.flatten(1).sum(1).equal(total * LAYERS)
    if not config.spans_layers:
        assert count.sum(2).equal(total[:, None].expand(-1, LAYERS))
    return state, pipeline


def finished_prefills(
    cache: Cache, planner: BlockPlanner, chosen: dict[int, PromptPlan]
) -> FinishedPrefills:
    config, plans = planner.config, chosen.values()
    owners = {Scope.UNIFORM: 1, Scope.LAYER: NUM_KV_HEADS}.get(
        config.allocation.scope, NUM_KV_HEADS * LAYERS
    )
    num_blocks = max(-(-plan.facts.length // cache.block_size) for plan in plans)
    segments = np.stack([plan.facts.segments(num_blocks * cache.block_size) for plan in plans])
    has_segments = Need.SEGMENTS in config.needs
    budgets = None
    if isinstance(config.allocation, StaticAllocator):
        budgets = torch.tensor([planner.head_budgets(plan) for plan in plans])
    return FinishedPrefills(
        batch=PromptBatch(
            2 * torch.tensor(list(chosen)),
            torch.tensor([plan.facts.length for plan in plans]),
            *(torch.tensor([getattr(plan, f) for plan in plans]) for f in PromptBatch._fields[2:]),
        ),
        block_table=cache.block_table[list(chosen), :num_blocks].long(),
        max_pages=max(min(p.num_kept_blocks * owners, p.num_full_blocks) for p in plans),
        pages_per_layer=max(plan.num_kept_blocks for plan in plans) * NUM_KV_HEADS,
        visual=torch.from_numpy(segments >= 0) if config.candidates is not Candidates.ALL else None,
        segment=torch.from_numpy(segments) if has_segments else None,
        num_segments=int(segments.max()) + 1 if has_segments else 0,
        grids=torch.from_numpy(
            np.stack([plan.facts.grids(max(int(segments.max()) + 1, 1)) for plan in plans])
        )
        if Need.GRIDS in config.needs
        else None,
        head_budgets=budgets,
    )


def layer_stack(cache: Cache, planner: BlockPlanner, chosen: dict[int, PromptPlan]) -> LayerStack:
    """What a model would show of the chosen prompts, NaN where nobody may look."""
    config, plans = planner.config, list(chosen.values())
    prompts = [cache.prompts[i] for i in chosen]
    num_rows = max(plan.num_rows for plan in plans)
    queries = torch.full((LAYERS, len(plans), num_rows, NUM_Q_HEADS, HEAD_SIZE), float("nan"))
    # the sums of longer prompts may have been there before
    length = (max(-(-p.length // cache.block_size) for p in prompts) + 1) * cache.block_size
    sums = torch.full((LAYERS, len(plans), NUM_KV_HEADS, length), float("nan"))
    for layer in range(LAYERS):
        for i, (prompt, plan) in enumerate(zip(prompts, plans, strict=True)):
            first = prompt.length - plan.num_rows
            rows = torch.from_numpy(prompt.q[layer][:, first:]).transpose(0, 1)
            queries[layer, i, num_rows - plan.num_rows :] = rows
            collected = key_attention_sum(prompt.q[layer], prompt.k[layer], SCALE)
            sums[layer, i, :, : prompt.length] = torch.from_numpy(collected)
    needs, scorer = config.needs, config.scoring
    pairs = [(layer, prompt) for layer in range(LAYERS) for prompt in prompts]
    facts = {
        Need.KEY_ATTENTION_SUMS: ("key_attention_sum", lambda: sums),
        Need.HIDDEN_MOMENTS: (
            "hidden",
            lambda: stack([hidden_moments(p.hidden[layer], scorer) for layer, p in pairs]),
        ),
        Need.QUERY_MOMENTS: (
            "moments",
            lambda: stack([query_moments(p.raw[layer], scorer) for layer, p in pairs]),
        ),
        Need.OUTPUT_GRAMS: (
            "output_grams",
            lambda: output_grams(NUM_Q_HEADS, HEAD_SIZE)[:LAYERS],
        ),
    }
    return LayerStack(
        layers=tuple(range(LAYERS)),
        queries=queries,
        pages=cache.all_pages,
        layer_pages=cache.layer_pages,
        scale=torch.full((LAYERS,), SCALE),
        projector=maker_of(prompts),
        **{name: make() for need, (name, make) in facts.items() if need in needs},
    )
