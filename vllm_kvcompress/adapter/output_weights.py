# SPDX-License-Identifier: Apache-2.0
"""What a layer's output projection makes of the values of each query head.

Read once, when the engine starts, by pushing an identity through the projection: its weight may be
packed or quantized. Only products of a head's part with itself are kept, D x D numbers each.
Under tensor parallelism a rank's projection reads the heads of that rank, and nothing is summed.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from vllm_kvcompress.config import KVCompressionConfig, KVCompressionError
from vllm_kvcompress.scoring import Need

_grams: "weakref.WeakKeyDictionary[nn.Module, torch.Tensor]" = weakref.WeakKeyDictionary()
"""[Hq, D, D] by attention layer; of one engine, parts of one tensor."""


def grams_of(layers: Sequence[nn.Module]) -> torch.Tensor:
    """[L, Hq, D, D] float32 of an engine's compressed layers, see ``ScoringContext``."""
    first = _grams[layers[0]]
    return first.as_strided((len(layers), *first.shape), (first.numel(), *first.stride()))


def install(model: nn.Module, layers: Sequence[Attention], config: KVCompressionConfig) -> None:
    """Read the output projections of an engine whose method weighs by them.

    Args:
        layers: the compressed ones.

    Raises:
        KVCompressionError: a layer's output projection was not found.
    """
    if Need.OUTPUT_GRAMS not in config.needs:
        return
    if all(layer in _grams for layer in layers):
        return  # vLLM asks for specs twice when it profiles graphs
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    layers = sorted(layers, key=lambda layer: extract_layer_index(layer.layer_name))
    # all are found before any is read
    found = [_projection(layer, parents.get(layer), config) for layer in layers]
    grams = torch.stack([_read(*pair) for pair in zip(layers, found, strict=True)])
    for layer, gram in zip(layers, grams, strict=True):
        _grams[layer] = gram


def _projection(
    layer: Attention, parent: nn.Module | None, config: KVCompressionConfig
) -> RowParallelLinear:
    """The one linear layer beside ``layer`` that reads what its heads give out."""
    width = layer.num_heads * layer.head_size
    found = []
    for module in () if parent is None else parent.children():
        plain = module.base_layer if isinstance(module, BaseLinearLayerWithLoRA) else module
        if isinstance(plain, RowParallelLinear) and plain.input_size_per_partition == width:
            found.append(plain)
    if len(found) != 1:
        raise KVCompressionError(
            f"{config.scorer} weighs tokens by the output projection, and beside "
            f"{layer.layer_name} there is none that reads {width} numbers, or more than one: set "
            '"weight": "none" in --kv-compression-config.'
        )
    return found[0]


@torch.inference_mode()
def _read(layer: Attention, projection: RowParallelLinear) -> torch.Tensor:
    """[Hq, D, D] float32 of one layer."""
    num_heads, size = layer.num_heads, layer.head_size
    method = projection.quant_method
    assert method is not None, "vLLM gives every linear layer one"
    device = next(iter([*projection.parameters(), *projection.buffers()])).device
    unit = torch.eye(num_heads * size, dtype=projection.params_dtype, device=device)
    grams = []
    for rows in unit.split(size):  # one head at a time: large models have large outputs
        part = method.apply(projection, rows.contiguous(), bias=None).float()  # [D, d]
        grams.append(part @ part.T)
    return torch.stack(grams)
