# SPDX-License-Identifier: Apache-2.0
"""Settings of the plugin in the oracle's words."""

from oracle import OracleConfig

from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.config import KVCompressionConfig


def oracle_settings(
    config: KVCompressionConfig, block_size: int, pool_block: int = 1
) -> OracleConfig:
    """The same settings for the oracle; the blocks are those of ``BlockPlanner``."""
    budget = config.budget
    return OracleConfig(
        budget=f"{100 * budget.ratio:.12g}%" if budget.tokens is None else budget.tokens,
        scorer=config.scorer,
        allocator=config.allocator,
        merge=config.merge,
        candidates=None if config.candidates is Candidates.AFTER_TEXT else config.candidates.value,
        window=config.window,
        block_size=block_size,
        pool_block=pool_block,
        **config.options,
    )
