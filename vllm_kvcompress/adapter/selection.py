# SPDX-License-Identifier: Apache-2.0
"""Gives full-attention decoder layers of a compressing engine our subclass of their backend.

Sliding-window, chunked, encoder and cross-attention layers keep the stock backend, and so does
every layer of an engine that does not compress.
"""

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_kvcompress.adapter import compatibility
from vllm_kvcompress.adapter.compression_config import current_compression_config
from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.waiting import bytes_per_layer
from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError

_SUPPORTED = {
    "CPU_ATTN": ("vllm_kvcompress.adapter.cpu", "CompressedCPUBackend"),
    "FLASH_ATTN": ("vllm_kvcompress.adapter.flash", "CompressedFlashBackend"),
}


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

    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    as_dtype = f"--dtype {_name(half)}"
    as_cache = f"--kv-cache-dtype {_name(half)}"  # auto may be what the checkpoint asks for
    for flags, changed in (
        ((), (dtype, kv_cache_dtype)),
        ((as_cache,), (dtype, _name(half))),
        ((as_dtype,), (half, kv_cache_dtype)),
        ((as_dtype, as_cache), (half, _name(half))),
    ):
        problems = FlashAttentionBackend.validate_configuration(
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
    """Fields of ``CompressedSpec`` that depend on the engine; see there."""

    config: KVCompressionConfig
    model_kv_heads: int
    entry_bytes: int
    max_entries: int


def spec_fields(vllm_config: VllmConfig, config: KVCompressionConfig) -> SpecFields:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = model.dtype
    assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
    entry_bytes = bytes_per_layer(
        config,
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        hidden_size=model.get_hidden_size(),
        max_length=model.max_model_len,
        element_size=dtype.itemsize,
    )
    return SpecFields(
        config,
        model.get_total_num_kv_heads(),
        entry_bytes,
        vllm_config.scheduler_config.max_num_seqs,
    )


@functools.cache
def compressed(backend: type[AttentionBackend], fields: SpecFields) -> type[AttentionBackend]:
    """Our subclass of ``backend``, one of the supported, for an engine with these fields."""
    module, cls_name = _SUPPORTED[backend.get_name()]
    cls = getattr(importlib.import_module(module), cls_name)
    return type(cls_name, (cls,), {"extra": fields._asdict()})
