# SPDX-License-Identifier: Apache-2.0
"""Heads that are spread over tensor-parallel ranks."""

from collections.abc import Callable

import numpy as np
import torch
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)


def mean_over_replicas(model_heads: int, ranks: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes ranks that hold the same KV head agree on what they found with their query heads.

    Returns:
        A function of [N, Hkv, T]: the mean over these ranks, bit for bit the same on all of them.
        With as many heads as ranks, or more, it returns what it is given.
    """
    replicas = ranks // model_heads
    if replicas <= 1:
        return lambda values: values

    def mean(values: torch.Tensor) -> torch.Tensor:
        # one sum over all ranks, each at its head's place, instead of a group for every head
        own = get_tensor_model_parallel_rank() // replicas
        total = values.new_zeros((model_heads, *values.shape))
        total[own] = values
        torch.distributed.all_reduce(total, group=get_tp_group().device_group)
        return total[own] / replicas

    return mean


def mean_over_heads(values: torch.Tensor) -> torch.Tensor:
    """Mean over dimension 1, the heads of this rank, and over the ranks: all have equally many."""
    mean = values.mean(1)
    ranks = get_tensor_model_parallel_world_size()
    if ranks > 1:
        # torch's own all-reduce: those of vLLM know no float64
        torch.distributed.all_reduce(mean, group=get_tp_group().device_group)
        mean /= ranks
    return mean


def rank_heads(model_heads: int, rank_heads: int, ranks: int) -> np.ndarray:
    """Which KV heads of the model this rank holds; several ranks may hold the same one."""
    rank = get_tensor_model_parallel_rank() if ranks > 1 else 0
    first = rank * model_heads // ranks
    return np.arange(first, first + rank_heads)
