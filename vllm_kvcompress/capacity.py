# SPDX-License-Identifier: Apache-2.0
"""How many requests of a kind fit into a block pool, with compression and without."""

from dataclasses import dataclass

from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts


@dataclass(frozen=True)
class ModelShape:
    """What a model's cache and weights take, over all ranks.

    Attributes:
        num_layers, num_kv_heads, head_size: of its full-attention layers.
        element_bytes: of the cache.
        weight_bytes: of all parameters.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    element_bytes: int
    weight_bytes: int

    def token_bytes(self, ranks: int = 1) -> int:
        """Keys and values of one token on one rank; ranks may hold the same head."""
        heads = max(1, self.num_kv_heads // ranks)
        return 2 * self.num_layers * heads * self.head_size * self.element_bytes


@dataclass(frozen=True)
class Holding:
    """What requests of a kind hold.

    Attributes:
        peak_blocks: of one request, at the end of its prefill.
        end_blocks: of one request, at its last output token.
        at_once: requests that fit into the pool until each of them ends.
        read_tokens: whose keys and values a KV head reads for an output token, mean over them.
    """

    peak_blocks: int
    end_blocks: int
    at_once: int
    read_tokens: float


def num_blocks(cache_bytes: int, token_bytes: int, block_size: int) -> int:
    """Blocks that vLLM makes of so much memory; one of them is its null block."""
    return cache_bytes // (token_bytes * block_size)


def uncompressed(facts: PromptFacts, output_len: int, block_size: int, pool: int) -> Holding:
    """Stock vLLM.

    Args:
        output_len: tokens, at least 1; the last one is never computed.
        pool: blocks, the null block included.
    """
    computed = facts.length + output_len - 1
    prompt, end = -(-facts.length // block_size), -(-computed // block_size)
    return Holding(prompt, end, (pool - 1) // end, facts.length + output_len / 2)


def compressed(planner: BlockPlanner, facts: PromptFacts, output_len: int, pool: int) -> Holding:
    """With every prompt compressed at once: one uncompressed prompt on top of the others."""
    plan = planner.plan(facts)
    stock = uncompressed(facts, output_len, planner.block_size, pool)
    if not plan.compresses or output_len < 2:  # whoever ends with the first token is not compressed
        return stock
    end = stock.end_blocks - plan.num_freed_blocks
    most = max(stock.peak_blocks, end)
    at_once = 1 + (pool - 1 - most) // end if pool > most else 0
    return Holding(stock.peak_blocks, end, at_once, planner.kept_tokens(plan) + output_len / 2)
