# SPDX-License-Identifier: Apache-2.0
"""Gives full-attention decoder layers of a compressing engine our subclass of their backend.

Sliding-window, chunked, encoder and cross-attention layers keep the stock backend, and so does
every layer of an engine that does not compress.
"""

import functools
import importlib
from typing import NamedTuple

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.v1.attention.backend import AttentionBackend, AttentionType

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
    def get_attn_backend(*args, **kwargs):
        backend = original(*args, **kwargs)
        config = current_compression_config()
        if config is None:
            return backend
        attn_type = kwargs.get("attn_type") or AttentionType.DECODER
        if attn_type != AttentionType.DECODER or kwargs.get("has_sliding_window"):
            return backend
        return compressed(backend, spec_fields(get_current_vllm_config(), config))

    return get_attn_backend


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
    """Our subclass of ``backend`` for an engine whose specs have these fields.

    Raises:
        KVCompressionError: there is none.
    """
    name = backend.get_name()
    if name not in _SUPPORTED:
        raise KVCompressionError(
            f"KV compression does not support the attention backend {name} that vLLM chose: force "
            "--attention-backend FLASH_ATTN (16-bit dtype, head size a multiple of 8 up to 256), "
            "or serve the model without --kv-compression."
        )
    module, cls_name = _SUPPORTED[name]
    cls = getattr(importlib.import_module(module), cls_name)
    return type(cls_name, (cls,), {"extra": fields._asdict()})
