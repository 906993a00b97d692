# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a prompt survive: a pure function that scheduler and workers both evaluate.

A prompt of P tokens with block size bs has m = P // bs full blocks and a tail of P - m*bs tokens.

    | b0 b1 ... b(m-n-1)         | b(m-n) ... b(m-1)          | tail block | decode blocks ...
    | returned to the pool,      | head pages of the kept     | as stock vLLM writes them
    | still hashed for reuse     | tokens, private, unhashed  |

Blocks are those that attention kernels see. Where vLLM's pool deals in larger ones, those come back
that lie wholly before the kept blocks.

A *head page* is the part of a block that belongs to one KV head of one layer: block_size tokens.
The n kept blocks hold n * num_kv_heads head pages per layer, which the heads share out: those of
one layer among themselves, or those of all layers when the allocator moves budget across layers.
"""

import functools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

from vllm_kvcompress.allocation import StaticAllocator
from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import Need


@dataclass(frozen=True)
class PromptPlan:
    """What happens to one prompt.

    Attributes:
        num_full_blocks: m, full blocks of the prompt.
        num_kept_blocks: n, the last n of the m blocks, which hold the kept tokens.
        num_freed_blocks: blocks of the pool that come back, see ``BlockPlanner.pool_block``.
        tail: tokens in the partial last block; always kept.
        capacity: nominal competing tokens that a head keeps.
        num_candidates: competing tokens as allocators count them.
        num_protected: tokens that every head keeps anyway; capacity + num_protected is the nominal
            total.
        num_protected_in_blocks: those of them that are in full blocks.
        num_recent: last tokens that are always kept.
        num_rows: last prompt tokens whose queries a method looks at (query rows).
        instruction_len: how many of them belong to the instruction.
        stats_from: first position that counts in any sum over the prompt.
        moments_from: first position that counts in moments.
        max_hit: most tokens that may be taken from the prefix cache: query rows and
            the kept blocks must be recomputed, because compaction writes into the latter.
        facts: of the prompt.
        config: how it is compressed.
    """

    num_full_blocks: int
    num_kept_blocks: int
    num_freed_blocks: int
    tail: int
    capacity: int
    num_candidates: int
    num_protected: int
    num_protected_in_blocks: int
    num_recent: int
    num_rows: int
    instruction_len: int
    stats_from: int
    moments_from: int
    max_hit: int
    facts: PromptFacts
    config: KVCompressionConfig

    @property
    def first_row(self) -> int:
        """First position whose token a method looks at."""
        return min(self.facts.length - self.num_rows, self.stats_from)

    def looks_at(self, start: int, end: int) -> bool:
        """Whether a method looks at a prompt token at a position in [start, end)."""
        return min(end, self.facts.length) > max(start, self.first_row)

    @property
    def compresses(self) -> bool:
        """False: no block would come back, and the prompt stays exactly as stock vLLM keeps it."""
        return self.num_freed_blocks > 0


@dataclass(frozen=True)
class BlockPlanner:
    """Makes a :class:`PromptPlan` from the facts of a prompt.

    Attributes:
        config: how prompts are compressed, unless ``with_config`` says otherwise.
        block_size: tokens per block, as attention kernels see it.
        num_layers, num_kv_heads: compressed layers, and KV heads of the model over all ranks.
        pool_block: how many of these make one block of vLLM's pool.
    """

    config: KVCompressionConfig
    block_size: int
    num_layers: int
    num_kv_heads: int
    pool_block: int = 1

    def with_config(self, config: KVCompressionConfig) -> "BlockPlanner":
        """Plans prompts of the same model by another config."""
        return self if config is self.config else replace(self, config=config)

    def plan(self, facts: PromptFacts) -> PromptPlan:
        return _plan(self, facts)

    def kept_tokens(self, plan: PromptPlan) -> int:
        """Prompt tokens that a KV head keeps of a compressed prompt, mean over the heads."""
        return plan.num_kept_blocks * self.block_size + plan.tail

    def head_budgets(self, plan: PromptPlan) -> list[list[int]]:
        """C[l][g] of a static allocator, over all layers and KV heads of the model."""
        return _head_budgets(self.with_config(plan.config), plan.capacity, plan.num_candidates)


@functools.lru_cache(maxsize=1 << 12)
def _head_budgets(planner: BlockPlanner, capacity: int, num_candidates: int) -> list[list[int]]:
    allocator = planner.config.allocation
    assert isinstance(allocator, StaticAllocator)
    return allocator.head_budgets(
        capacity, num_candidates, planner.num_layers, planner.num_kv_heads
    )


@functools.lru_cache(maxsize=1 << 14)
def _plan(planner: BlockPlanner, facts: PromptFacts) -> PromptPlan:
    config, block_size, length = planner.config, planner.block_size, facts.length
    num_full = length // block_size
    tail = length - num_full * block_size
    capacity, num_candidates, num_recent = _competition(config, block_size, facts)
    num_protected = (
        length - num_candidates if config.candidates is not Candidates.ALL else config.window
    )
    in_pages = num_full * block_size
    if config.candidates is Candidates.ALL:
        num_protected_in_blocks = max(0, num_recent - tail)
    else:
        num_protected_in_blocks = in_pages - facts.num_visual(min(in_pages, length - num_recent))
    num_rows, instruction_len = _rows(config, facts)
    stats_from, moments_from = _sums(config, length)

    num_kept = num_full
    if 0 <= capacity < num_candidates:
        mean = Fraction(capacity)
        if isinstance(config.allocation, StaticAllocator):
            tokens = _head_budgets(planner, capacity, num_candidates)
            mean = Fraction(sum(map(sum, tokens)), sum(map(len, tokens)))
        pages = math.ceil((mean + num_protected - tail) / block_size)
        num_kept = min(num_full, max(1, pages, -(-num_protected_in_blocks // block_size)))
    first_row = min(length - num_rows, stats_from)
    num_freed = (num_full - num_kept) // planner.pool_block
    if not num_freed:
        num_kept = num_full
    pool_tokens = planner.pool_block * block_size
    return PromptPlan(
        num_full_blocks=num_full,
        num_kept_blocks=num_kept,
        num_freed_blocks=num_freed,
        tail=tail,
        capacity=capacity,
        num_candidates=num_candidates,
        num_protected=num_protected,
        num_protected_in_blocks=num_protected_in_blocks,
        num_recent=num_recent,
        num_rows=num_rows,
        instruction_len=instruction_len,
        stats_from=stats_from,
        moments_from=moments_from,
        max_hit=min(num_freed, first_row // pool_tokens) * pool_tokens
        if num_freed
        else max(length - 1, 0),
        facts=facts,
        config=config,
    )


def _competition(
    config: KVCompressionConfig, block_size: int, facts: PromptFacts
) -> tuple[int, int, int]:
    """Capacity, competing tokens and R of a prompt."""
    budget, window, length = config.budget, config.window, facts.length
    scorer = config.scoring
    if budget.tokens is not None:
        kept = budget.tokens
    else:  # never below one block or window + 1
        kept = max(math.ceil(budget.exact_ratio * length), block_size, window + 1)
    recent = min(scorer.num_recent(window, kept), length)
    if config.candidates is Candidates.ALL:
        return kept - window, length - window, recent
    visual = facts.num_visual(length - recent)
    if config.candidates is Candidates.AFTER_TEXT:
        return max(0, kept - recent - (length - recent - visual)), visual, recent
    if budget.tokens is not None:
        return min(budget.tokens, visual), visual, recent
    return min(visual, max(1, round(budget.exact_ratio * visual))), visual, recent


def _rows(config: KVCompressionConfig, facts: PromptFacts) -> tuple[int, int]:
    """Rows whose queries are looked at, and those of the instruction."""
    needs, length = config.needs, facts.length
    instruction_len = facts.num_instruction_tokens(config.window)
    num_rows = 0
    if Need.WINDOW_QUERIES in needs:
        num_rows = config.window
    if Need.INSTRUCTION_QUERIES in needs:
        num_rows = max(num_rows, instruction_len)
    if Need.LAST_QUERY in needs:
        num_rows = max(num_rows, 1)
    return min(num_rows, length), instruction_len


def _sums(config: KVCompressionConfig, length: int) -> tuple[int, int]:
    """First rows that count in any sum over the prompt, and in moments."""
    moments_from = length
    if config.needs & (Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS):
        moments_from = config.scoring.stats_from(length)
    return 0 if Need.KEY_ATTENTION_SUMS in config.needs else moments_from, moments_from
