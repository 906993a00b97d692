# SPDX-License-Identifier: Apache-2.0
"""Gives full-attention decoder layers of a compressing engine our subclass of their backend.

Sliding-window, chunked, encoder and cross-attention layers keep the stock backend, and so does
every layer of an engine that does not compress.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_kvcompress.adapter import compatibility
from vllm_kvcompress.adapter.backend import compressed_modules
from vllm_kvcompress.adapter.compression_config import (
    compression_choices,
    current_compression_config,
)
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.waiting import bytes_per_layer
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

logger = init_logger("vllm.kvcompress")

_SUPPORTED = {
    "CPU_ATTN": ("vllm_kvcompress.adapter.cpu", "CompressedCPUBackend"),
    "FLASH_ATTN": ("vllm_kvcompress.adapter.flash", "CompressedFlashBackend"),
    "TRITON_ATTN": ("vllm_kvcompress.adapter.triton_attn", "CompressedTritonBackend"),
}


def supported_backends() -> list[str]:
    """Names of vLLM's attention backends that are compressed on."""
    return list(_SUPPORTED)


def install() -> None:
    wrap(attention_layer, "get_attn_backend", _choose)


def _choose(original):
    signature = inspect.signature(original)

    def get_attn_backend(*args, **kwargs):
        backend = original(*args, **kwargs)
        config = current_compression_config()
        if config is None:
            return backend
        asked = signature.bind(*args, **kwargs)
        asked.apply_defaults()
        if (asked.arguments["attn_type"] or AttentionType.DECODER) != AttentionType.DECODER:
            return backend
        vllm_config = get_current_vllm_config()
        if backend.get_name() not in _SUPPORTED:
            ours = _instead(vllm_config, asked.arguments)
            if ours is not None:  # for all layers, so that their caches are laid out alike
                logger.info_once(
                    "KV compression uses the attention backend %s in place of %s, which vLLM "
                    "prefers here; --attention-backend names another.",
                    ours.get_name(),
                    backend.get_name(),
                )
                backend = ours
            elif not asked.arguments["has_sliding_window"]:
                raise KVCompressionError(
                    "KV compression does not support the attention backend "
                    f"{backend.get_name()}: {_advice(asked.arguments)}."
                )
        if asked.arguments["has_sliding_window"]:
            return backend
        return compressed(backend, spec_fields(vllm_config, config))

    return get_attn_backend


def _instead(vllm_config: VllmConfig, layer: Mapping[str, Any]) -> type[AttentionBackend] | None:
    """One of ours that can serve a layer whose backend the user has not named; None for none."""
    attention = vllm_config.attention_config
    if attention.backend is not None or attention.backend_per_kind:
        return None
    for backend in _candidates():
        if not _problems(backend, layer, layer["dtype"], layer["kv_cache_dtype"]):
            return backend
    return None


def _candidates() -> list[type[AttentionBackend]]:
    """vLLM's GPU backends that we support on this platform, best first."""
    candidates: list[type[AttentionBackend]] = []
    if current_platform.is_cuda():
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

        candidates.append(FlashAttentionBackend)
    if current_platform.is_cuda_alike():
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

        candidates.append(TritonAttentionBackend)
    return candidates


def _problems(
    backend: type[AttentionBackend],
    layer: Mapping[str, Any],
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
) -> list[str]:
    """Why a backend cannot serve a layer with these types; vLLM says it."""
    capability = current_platform.get_device_capability()
    validate: Callable[..., list[str]] = backend.validate_configuration
    problems = validate(
        head_size=layer["head_size"],
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=None,
        use_mla=False,
        has_sink=layer["has_sink"],
        use_sparse=False,
        use_mm_prefix=layer["use_mm_prefix"],
        use_per_head_quant_scales=layer["use_per_head_quant_scales"],
        device_capability=capability,
        attn_type=AttentionType.DECODER,
    )
    if backend.get_name() == "TRITON_ATTN" and current_platform.is_cuda():
        # what vLLM says of these only where it builds a layer
        level = capability.to_int() if capability is not None else 0
        if (kv_cache_dtype or "").startswith("fp8") and level < 89:
            problems.append("fp8 needs compute capability 8.9")
        if kv_cache_dtype == "bfloat16" and level < 80:
            problems.append("bfloat16 needs compute capability 8.0")
    return problems


def _advice(layer: Mapping[str, Any]) -> str:
    """What to change so that vLLM can take a backend of ours for such a layer."""
    candidates = _candidates()
    if not candidates:
        return f"compression runs on CUDA, on ROCm and on CPUs, {compatibility.WITHOUT}"
    dtype, kv_cache_dtype = layer["dtype"], layer["kv_cache_dtype"]
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    as_dtype = f"--dtype {_name(half)}"
    as_cache = f"--kv-cache-dtype {_name(half)}"  # auto may be what the checkpoint asks for
    found = []
    for flags, changed in (
        ((), (dtype, kv_cache_dtype)),
        ((as_cache,), (dtype, _name(half))),
        ((as_dtype,), (half, kv_cache_dtype)),
        ((as_dtype, as_cache), (half, _name(half))),
    ):
        for backend in candidates:
            problems = _problems(backend, layer, *changed)
            if not problems:
                name = backend.get_name()
                return f"set {' '.join([f'--attention-backend {name}', *flags])}"
            found.append(f"{backend.get_name()}: {', '.join(problems)}")
    return f"none of its own can serve this here ({'; '.join(found[:2])}); {compatibility.WITHOUT}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class SpecFields(NamedTuple):
    """Fields of ``CompressedSpec`` that depend on the engine; see there.

    Those of the layers are known when the model is built, see ``describe_layers``.
    """

    config: KVCompressionConfig
    kernel_block_size: int
    max_entries: int
    model_kv_heads: int = 0
    entry_bytes: int = 0


def spec_fields(vllm_config: VllmConfig, config: KVCompressionConfig) -> SpecFields:
    # before vLLM makes blocks larger for the sake of other layers
    block_size = vllm_config.cache_config.block_size
    return SpecFields(config, block_size, vllm_config.scheduler_config.max_num_seqs)


def describe_layers(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Let the specs of the compressed layers tell what only built layers know.

    Other layers of the model may have other heads, and so may its configuration.
    """
    choices = compression_choices(vllm_config)
    if choices is None:
        return
    model_config, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    dtype = model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    for layer in compressed_modules(vllm_config):
        model_heads = layer.num_kv_heads * ranks
        if layer.num_kv_heads == 1 < ranks:  # several ranks may hold the same head
            model_heads = _total_kv_heads(parents[layer]) or model_config.get_total_num_kv_heads()
        entry_bytes = bytes_per_layer(
            choices.needs,
            choices.max_rows,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            hidden_size=model_config.get_hidden_size(),
            max_length=model_config.max_model_len,
            element_size=dtype.itemsize,
        )
        fields = SpecFields(**vars(layer.attn_backend)["extra"])._replace(
            model_kv_heads=model_heads, entry_bytes=entry_bytes
        )
        layer.attn_backend = _with_fields(layer.attn_backend.__bases__[0], fields)


def _total_kv_heads(attention: nn.Module) -> int | None:
    """KV heads over all ranks of an attention module that projects them together, else None."""
    for child in attention.children():
        plain = child.base_layer if isinstance(child, BaseLinearLayerWithLoRA) else child
        if isinstance(plain, QKVParallelLinear):
            return plain.total_num_kv_heads
    return None


def compressed(backend: type[AttentionBackend], fields: SpecFields) -> type[AttentionBackend]:
    """Our subclass of ``backend``, one of the supported, for an engine with these fields."""
    module, cls_name = _SUPPORTED[backend.get_name()]
    return _with_fields(getattr(importlib.import_module(module), cls_name), fields)


@functools.cache
def _with_fields(cls: type[AttentionBackend], fields: SpecFields) -> type[AttentionBackend]:
    return type(cls.__name__, (cls,), {"extra": fields._asdict()})
