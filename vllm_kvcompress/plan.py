# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a prompt survive: a pure function that scheduler and workers both evaluate.

A prompt of P tokens with block size bs has m = P // bs full blocks and a tail of P - m*bs tokens.

    | b0 b1 ... b(m-n-1)         | b(m-n) ... b(m-1)          | tail block | decode blocks ...
    | returned to the pool,      | head pages of the kept     | as stock vLLM writes them
    | still hashed for reuse     | tokens, private, unhashed  |

A *head page* is the part of a block that belongs to one KV head: block_size tokens. The n kept
blocks hold n * num_kv_heads head pages per layer, which the heads of that layer share out.
"""

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PromptPlan:
    """What happens to one prompt.

    Attributes:
        num_full_blocks: m, full blocks of the prompt.
        num_kept_blocks: n, the last n of the m blocks, which hold the kept tokens.
        tail: tokens in the partial last block; always kept.
        budget: tokens per KV head that the plan was made for, window included.
        max_hit: most tokens that may be taken from the prefix cache: the observation window and the
            kept blocks must be recomputed, because compaction writes into the latter.
    """

    num_full_blocks: int
    num_kept_blocks: int
    tail: int
    budget: int
    max_hit: int

    @property
    def num_freed_blocks(self) -> int:
        return self.num_full_blocks - self.num_kept_blocks

    @property
    def compresses(self) -> bool:
        """False: the prompt fits its budget, and stays exactly as stock vLLM keeps it."""
        return self.num_freed_blocks > 0


@dataclass(frozen=True)
class BlockPlanner:
    """Makes a :class:`PromptPlan` from a prompt length.

    Attributes:
        block_size: tokens per block.
        window: observation window W in tokens.
        budget_tokens, budget_ratio: exactly one is set; a ratio is of the prompt length.
    """

    block_size: int
    window: int
    budget_tokens: int | None = None
    budget_ratio: float | None = None

    def budget_for(self, prompt_len: int) -> int:
        """Tokens per KV head for this prompt; a ratio never goes below one block or window + 1."""
        if self.budget_ratio is None:
            assert self.budget_tokens is not None, "a planner has tokens or a ratio"
            return self.budget_tokens
        asked = math.ceil(self.budget_ratio * prompt_len)
        return max(asked, self.block_size, self.window + 1)

    def plan(self, prompt_len: int) -> PromptPlan:
        return _plan(self, prompt_len)


@functools.lru_cache(maxsize=1 << 16)
def _plan(planner: BlockPlanner, prompt_len: int) -> PromptPlan:
    block_size = planner.block_size
    num_full = prompt_len // block_size
    tail = prompt_len - num_full * block_size
    budget = planner.budget_for(prompt_len)
    num_kept = min(num_full, -(-(budget - tail) // block_size))
    if num_kept == num_full:
        return PromptPlan(num_full, num_full, tail, budget, max_hit=max(prompt_len - 1, 0))
    # budget >= window, so the kept blocks and the tail cover the window
    return PromptPlan(num_full, num_kept, tail, budget, max_hit=(num_full - num_kept) * block_size)
