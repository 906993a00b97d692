# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model that follow from its configuration."""

import torch
import transformers
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.capacity import ModelShape
from vllm_kvcompress.config import KVCompressionError


def shape_of(model: str, cache_dtype: str, weight_bytes: int | None) -> ModelShape:
    """Read a model's configuration; its weights are not needed.

    Args:
        model: name or folder.
        cache_dtype: as ``--kv-cache-dtype``.
        weight_bytes: of all parameters; None: count them.

    Raises:
        KVCompressionError: the model has no cache of one kind, or parameters cannot be counted.
    """
    config = EngineArgs(model=model).create_model_config()
    kinds = {*(vars(config.hf_text_config).get("layer_types") or ())} - {"full_attention"}
    if config.use_mla or config.is_hybrid or config.is_attention_free or kinds:
        raise KVCompressionError(
            "estimate knows models all of whose layers have full attention with KV heads; the pool "
            "of this one is shared by layers of several kinds."
        )
    assert isinstance(config.dtype, torch.dtype), "vLLM has resolved it"
    return ModelShape(
        config.get_total_num_hidden_layers(),
        config.get_total_num_kv_heads(),
        config.get_head_size(),
        1 if cache_dtype.startswith("fp8") else config.dtype.itemsize,
        _weight_bytes(config) if weight_bytes is None else weight_bytes,
    )


def _weight_bytes(config: ModelConfig) -> int:
    """Of the parameters of transformers' model, without memory for them."""
    hf, text = config.hf_config, config.hf_text_config
    if config.quantization is not None:
        raise KVCompressionError("the weights are quantized: say how large they are, --weights GIB")
    try:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(hf)
    except ValueError as error:
        raise KVCompressionError(
            "transformers does not know the model, so its parameters cannot be counted: say how "
            "large they are, --weights GIB"
        ) from error
    count = sum(parameter.numel() for parameter in model.parameters())
    if not text.tie_word_embeddings:
        count += text.vocab_size * text.hidden_size  # of the head, which this class lacks
    assert isinstance(config.dtype, torch.dtype), "vLLM has resolved it"
    return count * config.dtype.itemsize
