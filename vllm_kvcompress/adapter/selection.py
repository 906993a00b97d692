# SPDX-License-Identifier: Apache-2.0
"""Gives full-attention decoder layers of a compressing engine our subclass of their backend.

Sliding-window, chunked, encoder and cross-attention layers keep the stock backend, and so does
every layer of an engine that does not compress.
"""

import functools
import importlib
import json

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import attention as attention_layer
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_kvcompress.adapter.patching import wrap
from vllm_kvcompress.adapter.settings import current_settings
from vllm_kvcompress.config import KVCompressionError

_SUPPORTED = {
    "CPU_ATTN": ("vllm_kvcompress.adapter.cpu", "CompressedCPUBackend"),
    "FLASH_ATTN": ("vllm_kvcompress.adapter.flash", "CompressedFlashBackend"),
}


def install() -> None:
    wrap(attention_layer, "get_attn_backend", _choose)


def _choose(original):
    def get_attn_backend(*args, **kwargs):
        backend = original(*args, **kwargs)
        settings = current_settings()
        if settings is None:
            return backend
        # not left to our worker extension: the user may have named another one
        from vllm_kvcompress.adapter import runner

        runner.install()
        attn_type = kwargs.get("attn_type") or AttentionType.DECODER
        if attn_type != AttentionType.DECODER or kwargs.get("has_sliding_window"):
            return backend
        model = get_current_vllm_config().model_config
        return compressed(backend, json.dumps(settings.to_json()), model.get_total_num_kv_heads())

    return get_attn_backend


@functools.cache
def compressed(
    backend: type[AttentionBackend], settings: str, model_kv_heads: int
) -> type[AttentionBackend]:
    """Our subclass of ``backend`` for an engine with these settings (JSON).

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
    return type(cls_name, (cls,), {"settings": settings, "model_kv_heads": model_kv_heads})
