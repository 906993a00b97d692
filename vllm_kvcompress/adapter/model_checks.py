# SPDX-License-Identifier: Apache-2.0
"""What a model's cache must look like, and what compression takes beside it."""

from collections.abc import Mapping

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_kvcompress.adapter.backend import compressed_modules
from vllm_kvcompress.adapter.kv_cache import CompressedSpec
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.page_state import table_ids
from vllm_kvcompress.prefill_stats import bytes_per_token

UNCOMPRESSED_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
"""Layers that may stand beside compressed ones, and stay as they are."""


def compressed_spec(kv_cache_config: KVCacheConfig) -> CompressedSpec:
    """The spec of the one group of layers that is compressed.

    Raises:
        KVCompressionError: vLLM would serve this model uncompressed, or in a way we cannot follow.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    found = [spec for spec in specs if isinstance(spec, CompressedSpec)]
    others = {type(spec) for spec in specs} - {CompressedSpec, *UNCOMPRESSED_SPECS}
    if len(found) != 1 or others or found[0].non_causal:
        names = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise KVCompressionError(
            "KV compression needs one group of like causal full-attention layers, beside which "
            "only sliding-window, chunked-attention and Mamba-like layers may stand; this model's "
            f"cache groups are: {names}. Serve it without --kv-compression."
        )
    return found[0]


def check_files(vllm_config: VllmConfig, spec: CompressedSpec) -> None:
    """Files among the allocator's options must belong to the model.

    Raises:
        KVCompressionError: one was made for another model.
    """
    heads = compressed_modules(vllm_config)[0].num_heads  # of this rank; the layers are alike
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for config in spec.choices.configs:
        try:
            config.allocation.check_model(spec.num_layers, heads * ranks)
        except ValueError as error:
            raise KVCompressionError(f"{config.allocator}: {error}.") from error


def reserved_bytes(specs: Mapping[str, KVCacheSpec], vllm_config: VllmConfig) -> int:
    """Device memory that compression may take beside weights, activations and cache.

    What prompts keep until they are compressed, temporaries of a step's statistics or of one
    compression, what a method keeps for good, and page tables.
    """
    found = [spec for spec in specs.values() if isinstance(spec, CompressedSpec)]
    if not found:
        return 0
    spec = CompressedSpec.merge(found)
    kept = spec.num_entries * spec.entry_bytes * spec.num_layers
    max_blocks = -(-vllm_config.model_config.max_model_len // spec.kernel_block_size)
    num_seqs = vllm_config.scheduler_config.max_num_seqs * spec.num_kv_heads
    choices, model = spec.choices, vllm_config.model_config
    num_heads = compressed_modules(vllm_config)[0].num_heads
    hidden_size = model.get_hidden_size()
    assert isinstance(model.dtype, torch.dtype), "vLLM has resolved it"
    per_token = bytes_per_token(
        choices.needs,
        num_heads=num_heads,
        head_size=spec.head_size,
        hidden_size=hidden_size,
        element_size=model.dtype.itemsize,
    )
    # padding takes less than as much again, and sums are added up beside what they are added to
    of_step = 2 * vllm_config.scheduler_config.max_num_batched_tokens * per_token
    of_step += spec.num_entries * spec.entry_bytes
    workspace = max(spec.config.workspace_mib << 20, of_step)
    scorers = {config.scoring for config in choices.configs}
    kept_for_good = sum(scorer.kept_for_good(hidden_size) for scorer in scorers)
    for_good = 4 * spec.num_layers * kept_for_good
    tables = 4 * table_ids(num_seqs, max_blocks, spec.num_layers)
    return kept + spec.config.copy_bytes + workspace + for_good + tables
