# SPDX-License-Identifier: Apache-2.0
"""The compression config of an engine, found through its ``VllmConfig``."""

import functools
import json

from vllm.config import VllmConfig, get_current_vllm_config_or_none

from vllm_kvcompress.budget import Candidates
from vllm_kvcompress.choices import Choices
from vllm_kvcompress.config import CONFIG_KEY, KVCompressionConfig

BLOCK_SIZE_KEY = "kv_compression_block_size"
"""Key inside ``additional_config`` of a block's size as attention kernels see it: that of vLLM's
own configuration grows where blocks have to be as large as the state of a Mamba layer."""


def compression_config(vllm_config: VllmConfig | None) -> KVCompressionConfig | None:
    """None when this engine does not compress."""
    extra = vllm_config.additional_config if vllm_config is not None else None
    raw = extra.get(CONFIG_KEY) if isinstance(extra, dict) else None
    return KVCompressionConfig.parse(raw) if raw is not None else None


def compression_choices(vllm_config: VllmConfig) -> Choices | None:
    """What requests may choose; None when this engine does not compress."""
    extra = vllm_config.additional_config
    if not isinstance(extra, dict) or CONFIG_KEY not in extra:
        return None
    return _choices(json.dumps(extra[CONFIG_KEY]), extra[BLOCK_SIZE_KEY])


@functools.lru_cache(maxsize=1 << 5)  # requests ask for the same
def _choices(raw: str, block_size: int) -> Choices:
    return Choices.of(KVCompressionConfig.parse(json.loads(raw)), block_size)


def current_compression_config() -> KVCompressionConfig | None:
    """Of the engine that is being set up right now."""
    return compression_config(get_current_vllm_config_or_none())


def describe_budget(config: KVCompressionConfig) -> str:
    """In words, for the start-up line."""
    of = "visual tokens" if config.candidates is Candidates.VISUAL else "prompt"
    budget = config.budget
    if budget.tokens is None:
        return f"{budget} of the {of}"
    return f"{budget} visual tokens" if of != "prompt" else f"{budget} tokens"
