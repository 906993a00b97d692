# SPDX-License-Identifier: Apache-2.0
"""What compression cannot be combined with, and what the user can change.

Checked before any request.
"""

import importlib.util
from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention

from vllm_kvcompress import kernels
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES, is_supported
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

SUMMARY = (
    "MLA, encoder-decoder and pooling models, speculative decoding, KV connectors and offloading, "
    "context and pipeline parallelism, micro-batching, quantized KV caches other than fp8 with one "
    "scale per layer, shared KV layers, attention sinks, ALiBi"
)

_ADVICE = "serve the model without --kv-compression"

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcompress.adapter.cpu_worker.CompressedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcompress.adapter.worker.CompressedWorker",
}
"""vLLM's workers, and ours in their place."""

SCHEDULERS = {
    False: "vllm_kvcompress.adapter.scheduler.CompressedScheduler",
    True: "vllm_kvcompress.adapter.scheduler.CompressedAsyncScheduler",
}
"""Ours, by whether scheduling is asynchronous."""


def check(vllm_config: VllmConfig, config: KVCompressionConfig) -> None:
    """Raise one error with every reason why this engine cannot compress.

    Raises:
        KVCompressionError: at least one reason was found.
    """
    reasons = engine_reasons(vllm_config, config)
    if reasons:
        raise KVCompressionError.from_reasons(reasons)


def engine_reasons(vllm_config: VllmConfig, config: KVCompressionConfig) -> list[str]:
    """Reasons that the engine's configuration shows; layers add theirs when they are built."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    block_size = cache.block_size
    kept = config.tokens_per_head
    checks = (
        (model.use_mla, "the model uses MLA, whose latent cache has no KV heads: serve it without "
         "--kv-compression"),
        (model.is_encoder_decoder, "encoder-decoder models keep a cross-attention cache: serve it "
         "without --kv-compression"),
        (model.runner_type != "generate", "pooling models never decode: serve it without "
         "--kv-compression"),
        (vllm_config.speculative_config is not None, "speculative decoding: remove "
         "--speculative-config"),
        (vllm_config.kv_transfer_config is not None, "KV connectors and offloading store blocks by "
         "position: remove --kv-transfer-config and --kv-offloading-size"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism: set "
         "--decode-context-parallel-size 1"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism: set "
         "--prefill-context-parallel-size 1"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: set "
         "--pipeline-parallel-size 1"),
        (parallel.use_ubatching, "micro-batching: remove --enable-dbo and --ubatch-size"),
        (not is_supported(cache.cache_dtype), f"--kv-cache-dtype {cache.cache_dtype} packs several "
         "elements or scales into a token: use --kv-cache-dtype fp8 or auto"),
        (cache.cache_dtype in FLOAT8_TYPES and bool(cache.kv_cache_dtype_skip_layers), "layers "
         "with caches of unlike types: remove --kv-cache-dtype-skip-layers"),
        (kept is not None and kept < block_size, f"--kv-budget {kept} is smaller than one block: "
         f"set --kv-budget {block_size} or more, or a smaller --block-size than {block_size}"),
        (config.window > model.max_model_len, f"--kv-window {config.window} is longer than "
         f"--max-model-len {model.max_model_len}: lower the window"),
        (vllm_config.attention_config.use_non_causal, "non-causal attention: serve the model "
         "without --kv-compression"),
        (parallel.worker_cls not in {*WORKERS, *WORKERS.values()},
         f"--worker-cls {parallel.worker_cls}: compression brings its own worker, so remove the "
         "flag"),
        (scheduler.scheduler_cls not in {None, *SCHEDULERS.values()},
         f"--scheduler-cls {scheduler.scheduler_cls}: compression brings its own scheduler, so "
         "remove the flag"),
        (_shadows_triton_kernels(), "the folder triton_kernels of this project is on sys.path, "
         "where vLLM takes it for OpenAI's package of that name: start vLLM from another folder, "
         "or with python -P"),
        (model.is_mm_prefix_lm, "the model attends to images in both directions: serve it without "
         "--kv-compression"),
        (cache.kv_sharing_fast_prefill, "layers that share KV: remove --kv-sharing-fast-prefill"),
    )  # fmt: skip
    reasons = [reason for refused, reason in checks if refused]
    reasons += kernels.missing_on(vllm_config.device_config.device_type)
    return [reason + "." for reason in reasons]


def layer_reasons(*, sinks: bool, alibi: bool, kv_sharing: bool, kv_cache_dtype: str) -> list[str]:
    """Reasons that one attention layer shows."""
    checks = (
        (sinks, "attention sinks are per query head"),
        (alibi, "ALiBi slopes depend on the position inside the cache"),
        (kv_sharing, "a layer reads the KV cache of another layer"),
        (not is_supported(kv_cache_dtype), f"the checkpoint asks for a {kv_cache_dtype} cache"),
    )
    return [f"{reason}: {_ADVICE}." for refused, reason in checks if refused]


def check_layers(layers: Sequence[Attention]) -> None:
    """Raise for what shows once all layers and their checkpoint are loaded.

    Raises:
        KVCompressionError: KV heads have scales of their own, so that a sequence of a per-head
            batch would need another scale than the next; or layers cap their logits differently.
    """
    reasons = []
    if any(layer.get_buffer("_k_scale").numel() > 1 for layer in layers):
        reasons.append("the checkpoint has scales of its own for each KV head's cache")
    if len({soft_cap(layer) for layer in layers}) > 1:
        reasons.append("layers cap their logits differently")
    if reasons:
        raise KVCompressionError.from_reasons([f"{reason}: {_ADVICE}." for reason in reasons])


def soft_cap(layer: Attention) -> float:
    """Of a layer's logits; 0 for none. Every backend of ours has it, the base class has not."""
    return float(vars(layer.impl)["logits_soft_cap"] or 0.0)


def _shadows_triton_kernels() -> bool:
    found = importlib.util.find_spec("triton_kernels")
    return found is not None and found.origin == kernels.__file__
