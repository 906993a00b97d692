# SPDX-License-Identifier: Apache-2.0
"""Settings that pass the checks at start, prompts for them, and the same in the oracle's words."""

from typing import Any

import oracle
from hypothesis import strategies as st
from oracle_settings import oracle_settings

from vllm_kvcompress.budget import Budget
from vllm_kvcompress.config import KVCompressionConfig
from vllm_kvcompress.plan import BlockPlanner
from vllm_kvcompress.prompt import PromptFacts
from vllm_kvcompress.scoring import SCORERS

LAYERS, NUM_KV_HEADS = 3, 2


def planner_of(block_size: int, pool_block: int = 1, **settings: Any) -> BlockPlanner:
    config = KVCompressionConfig.parse(settings)
    return BlockPlanner(config, block_size, LAYERS, NUM_KV_HEADS, pool_block)


def oracle_config(planner: BlockPlanner) -> oracle.OracleConfig:
    """The oracle's form of a planner's settings."""
    return oracle_settings(planner.config, planner.block_size, planner.pool_block)


@st.composite
def prompts(draw, longest: int = 1500) -> PromptFacts:
    """Prompts with up to four images, at either end too, some of them side by side."""
    length = draw(st.integers(1, longest))
    edges = sorted(draw(st.lists(st.integers(0, length), max_size=8, unique=True)))
    runs = list(zip(edges[::2], edges[1::2], strict=False))
    return PromptFacts(length, tuple(runs))


@st.composite
def planners(draw, scorers=tuple(SCORERS), allocators=("uniform", "pyramid", "adakv")):
    """Planners of any scorer and candidates, with budgets in tokens or as ratios."""
    scorer = draw(st.sampled_from(scorers))
    settings: dict[str, Any] = {"window": draw(st.integers(1, 100))}
    if scorer == "h2o":
        settings["recent_share"] = draw(st.sampled_from([0.0, 0.05, 0.29, 0.5, 1.0]))
        settings["text_prior"] = draw(st.booleans())
    if scorer == "das":
        settings["base"] = draw(st.sampled_from(["snapkv", "shiftkv", "h2o", "postvision"]))
    if not SCORERS[scorer].countable:
        allocators = tuple(name for name in allocators if name != "adakv")
    settings["method"] = f"{scorer}+{draw(st.sampled_from(allocators))}"
    if scorer != "aircache" and not settings.get("text_prior"):
        settings["candidates"] = draw(st.sampled_from(["all", "visual"]))
    block_size = draw(st.sampled_from([1, 8, 16, 32, 128]))
    if draw(st.booleans()):
        settings["budget"] = Budget(ratio=draw(st.integers(1, 1000)) / 1000)
    else:
        least = max(settings["window"] + 1, block_size)
        settings["budget"] = Budget(tokens=draw(st.integers(least, least + 500)))
    return planner_of(block_size, draw(st.sampled_from([1, 1, 3])), **settings)
