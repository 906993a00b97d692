# SPDX-License-Identifier: Apache-2.0
"""The compression config of an engine, found through its ``VllmConfig``."""

from vllm.config import VllmConfig, get_current_vllm_config_or_none

from vllm_kvcompress.config import CONFIG_KEY, Candidates, KVCompressionConfig


def compression_config(vllm_config: VllmConfig | None) -> KVCompressionConfig | None:
    """None when this engine does not compress."""
    extra = vllm_config.additional_config if vllm_config is not None else None
    raw = extra.get(CONFIG_KEY) if isinstance(extra, dict) else None
    return KVCompressionConfig.parse(raw) if raw is not None else None


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
