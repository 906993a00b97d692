# SPDX-License-Identifier: Apache-2.0
"""What compression needs to know of the attention layers that vLLM has built."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils import torch_utils

from vllm_kvcompress.adapter import compatibility
from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES
from vllm_kvcompress.config import KVCompressionError
from vllm_kvcompress.kernels import PageLayout


class AllPages(NamedTuple):
    """The head pages of all compressed layers as one tensor.

    Attributes:
        pages: [num_pages, block_size * 2 * D], bytes where the cache is of a float8 type.
        layer_pages: pages from one layer to the next.
    """

    pages: torch.Tensor
    layer_pages: int


class LayerFacts:
    """The compressed layers of a worker's model, in their order.

    A layer that reads the cache of another has no position of its own: its queries attend to the
    head pages of the layer whose cache it reads.

    Attributes:
        modules: the attention layers that have a cache.
        layer_indices: of each in the model.
        position_of: from a layer's name to the position of its cache among the compressed ones.
        num_heads, num_kv_heads: Hq and Hkv of this rank.
        scale: [L] float32 device, of the logits; ``softcap`` is the same in all layers.
        dtype: of the model.
        float8: type of the cache's elements, if it is one of these.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        modules: dict[str, Attention],
        num_kv_heads: int,
        device: torch.device,
        layout: PageLayout,
    ) -> None:
        readers = {
            name: module.kv_sharing_target_layer_name
            for name, module in modules.items()
            if module.kv_sharing_target_layer_name is not None
        }
        names = sorted(modules.keys() - readers.keys(), key=extract_layer_index)
        # vLLM makes builders of their own for layers with other numbers of query heads
        if len({m.num_heads for m in modules.values()}) > 1 or {*readers.values()} - {*names}:
            raise KVCompressionError(
                "KV compression takes all layers together, but the full-attention layers of this "
                "model have different numbers of query heads: serve it without --kv-compression."
            )
        self.modules = [modules[name] for name in names]
        compatibility.check_layers(self.modules)
        self.layer_indices = tuple(extract_layer_index(name) for name in names)
        self.position_of = {name: index for index, name in enumerate(names)}
        self.position_of |= {name: self.position_of[owner] for name, owner in readers.items()}
        self.device, self.layout = device, layout
        impl = self.modules[0].impl
        self.num_heads, self.num_kv_heads = impl.num_heads, num_kv_heads
        self.softcap = compatibility.soft_cap(self.modules[0])
        self.scale = torch.tensor(
            [module.impl.scale for module in self.modules], dtype=torch.float32, device=device
        )
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype), "vLLM has resolved it"
        self.dtype = dtype
        self.float8 = FLOAT8_TYPES.get(impl.kv_cache_dtype)
        self._pages: AllPages | None = None

    def __len__(self) -> int:
        return len(self.modules)

    def upload(self, values: np.ndarray) -> torch.Tensor:
        """Start copying a host array to the device."""
        if self.device.type == "cpu":
            return torch.from_numpy(values)
        return torch_utils.async_tensor_h2d(values, device=self.device)

    @property
    def pages(self) -> AllPages:
        """The head pages of all layers.

        Raises:
            KVCompressionError: vLLM does not place the layers at equal distances.
        """
        caches = [module.kv_cache for module in self.modules]
        first = caches[0]
        if self._pages is None or self._pages.pages.data_ptr() != first.data_ptr():
            elems = first.shape[2] * first.shape[3]
            offsets = [cache.storage_offset() - first.storage_offset() for cache in caches]
            step = offsets[1] if len(offsets) > 1 else 0
            storages = {cache.untyped_storage().data_ptr() for cache in caches}
            regular = offsets == [index * step for index in range(len(offsets))]
            if len(storages) > 1 or not regular or step % (elems * self.num_kv_heads):
                raise KVCompressionError(
                    "KV compression reads all layers in one pass, but vLLM does not place the "
                    "layers of this model at equal distances: serve it without --kv-compression."
                )
            count = (offsets[-1] + first.numel()) // elems
            pages = torch.as_strided(first, (count, elems), (elems, 1), first.storage_offset())
            self._pages = AllPages(pages, step // elems)
        return self._pages

    def typed(self, pages: torch.Tensor) -> torch.Tensor:
        """Pages of a float8 cache, which vLLM allocates as bytes, in their type."""
        return pages if self.float8 is None else pages.view(self.float8)

    @cached_property
    def float8_scales(self) -> dict[str, torch.Tensor]:
        """[L] float32 of "query", "key" and "value"; vLLM has them on the host, too."""
        names = {"query": "_q_scale_float", "key": "_k_scale_float", "value": "_v_scale_float"}
        return {
            kind: self.upload(np.array([getattr(m, name) for m in self.modules], np.float32))
            for kind, name in names.items()
        }
