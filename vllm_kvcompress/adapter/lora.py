# SPDX-License-Identifier: Apache-2.0
"""Projections through the adapter of each request.

vLLM's LoRA layers know the adapter of every token of a batch. Rows that are no tokens of a batch
are projected here, by the same weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

NO_ADAPTER = -1


class RequestAdapters:
    """Which adapter the requests of a runner use.

    Attributes:
        most: adapters that can be in use at a time.
    """

    def __init__(self, runner: RunnerV1 | RunnerV2, most: int) -> None:
        self._runner, self.most = runner, most

    def _of(self, req_id: str) -> LoRARequest | None:
        runner = self._runner
        if isinstance(runner, RunnerV1):
            state = runner.requests.get(req_id)
            return None if state is None else state.lora_request
        return runner.lora_state.lora_requests.get(req_id)

    def count(self, req_ids: Sequence[str]) -> int:
        """How many different adapters the requests use."""
        return len({request.lora_int_id for request in map(self._of, req_ids) if request})

    def slots(self, req_ids: Sequence[str]) -> np.ndarray:
        """Where vLLM's layers hold the adapters of the requests, [N] int64; NO_ADAPTER for none.

        Those that requests of the last step have pushed out are brought back. The requests use
        ``most`` adapters at most.
        """
        requests = [self._of(req_id) for req_id in req_ids]
        manager = self._runner.lora_manager
        manager.set_active_adapters({request for request in requests if request}, None)
        held = manager._adapter_manager.lora_index_to_id
        return np.array(
            [held.index(request.lora_int_id) if request else NO_ADAPTER for request in requests],
            dtype=np.int64,
        )


def conflicts(layer: nn.Module, width: int, vllm_config: VllmConfig) -> list[str]:
    """Why the first ``width`` outputs of a layer cannot be had by ``project``; none as a rule."""
    lora, ranks = vllm_config.lora_config, vllm_config.parallel_config.tensor_parallel_size
    if lora is None or not isinstance(layer, BaseLinearLayerWithLoRA):
        return []
    if lora.fully_sharded_loras and ranks > 1:
        return ["ranks hold parts of every adapter: remove --fully-sharded-loras"]
    if layer.output_slices[0] < width:
        return ["vLLM divides the adapters of qkv_proj in another way: remove --enable-lora"]
    return []


def project(
    layer: nn.Module, rows: torch.Tensor, width: int, slots: torch.Tensor | None
) -> torch.Tensor:
    """The first outputs of a linear layer.

    Args:
        rows: [N, M, d], of N requests.
        width: how many outputs, from the first on.
        slots: [N] int64, of the requests' adapters; None where the engine has none.

    Returns:
        [N, M, width].
    """
    plain = layer.base_layer if isinstance(layer, BaseLinearLayerWithLoRA) else layer
    # not called as a module: that would run our own hooks
    found = plain.forward(rows.flatten(0, 1))[0][:, :width].unflatten(0, rows.shape[:2])
    if not isinstance(layer, BaseLinearLayerWithLoRA):
        return found
    assert slots is not None, "the engine has adapters"
    # one call for all adapters, in the precision of vLLM's own kernels; slot 0 stands in for none
    down = layer.lora_a_stacked[0][slots.clamp_min(0), 0].float()  # [N, rank, d]
    up = layer.lora_b_stacked[0][slots.clamp_min(0), 0, :width]  # [N, width, rank]
    up = up.masked_fill((slots < 0)[:, None, None], 0)
    inner = torch.matmul(rows.float(), down.mT).to(found.dtype)
    return found + torch.matmul(inner, up.to(found.dtype).mT)
