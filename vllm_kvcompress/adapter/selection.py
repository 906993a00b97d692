# SPDX-License-Identifier: Apache-2.0
"""Gives full-attention decoder layers of a compressing engine our subclass of their backend.

Sliding-window, chunked, encoder and cross-attention layers keep the stock backend, and so does
every layer of an engine that does not compress.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_kvcompress.adapter import compatibility
from vllm_kvcompress.adapter.backend import compressed_modules
from vllm_kvcompress.adapter.compression_config import (
    compression_config,
    current_compression_config,
)
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.waiting import bytes_per_layer
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

_SUPPORTED = {
    "CPU_ATTN": ("vllm_kvcompress.adapter.cpu", "CompressedCPUBackend"),
    "FLASH_ATTN": ("vllm_kvcompress.adapter.flash", "CompressedFlashBackend"),
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
        attn_type = asked.arguments["attn_type"] or AttentionType.DECODER
        if attn_type != AttentionType.DECODER or asked.arguments["has_sliding_window"]:
            return backend
        if backend.get_name() not in _SUPPORTED:
            raise KVCompressionError(
                f"KV compression does not support the attention backend {backend.get_name()} that "
                f"vLLM chose: {_advice(**asked.arguments)}."
            )
        return compressed(backend, spec_fields(get_current_vllm_config(), config))

    return get_attn_backend


def _advice(head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, **others: Any) -> str:
    """What to change so that vLLM can take FLASH_ATTN for such a layer; vLLM says what it takes."""
    if not current_platform.is_cuda():
        return f"compression runs on CUDA and on CPUs, {compatibility.WITHOUT}"
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    validate: Callable[..., list[str]] = FlashAttentionBackend.validate_configuration
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    as_dtype = f"--dtype {_name(half)}"
    as_cache = f"--kv-cache-dtype {_name(half)}"  # auto may be what the checkpoint asks for
    for flags, changed in (
        ((), (dtype, kv_cache_dtype)),
        ((as_cache,), (dtype, _name(half))),
        ((as_dtype,), (half, kv_cache_dtype)),
        ((as_dtype, as_cache), (half, _name(half))),
    ):
        problems = validate(
            head_size=head_size,
            dtype=changed[0],
            kv_cache_dtype=changed[1],
            block_size=None,
            use_mla=False,
            has_sink=others["has_sink"],
            use_sparse=False,
            use_mm_prefix=others["use_mm_prefix"],
            use_per_head_quant_scales=others["use_per_head_quant_scales"],
            device_capability=current_platform.get_device_capability(),
            attn_type=AttentionType.DECODER,
        )
        if not problems:
            return f"set {' '.join(['--attention-backend FLASH_ATTN', *flags])}"
    return f"it runs on FLASH_ATTN, which cannot serve this here ({', '.join(problems)}); " + (
        compatibility.WITHOUT
    )


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
    config = compression_config(vllm_config)
    if config is None:
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
            config,
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
