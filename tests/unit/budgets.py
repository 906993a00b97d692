# SPDX-License-Identifier: Apache-2.0
"""Budgets of allocators that count on base scores, without prompts or a pipeline."""

from types import SimpleNamespace

import torch

from vllm_kvcompress.allocation import Allocator, BudgetRequest
from vllm_kvcompress.scoring import Scores


def observed_of(allocator: Allocator, base: torch.Tensor, capacity: torch.Tensor) -> torch.Tensor:
    """What an allocator takes from base scores [R, Hkv, T]."""
    return allocator.observe(SimpleNamespace(capacity=capacity), Scores(base, base))


def tokens_of(
    allocator: Allocator, base: torch.Tensor, num_candidates: torch.Tensor, capacity: torch.Tensor
) -> torch.Tensor:
    """Scored tokens [N, Hkv] of each head of one layer."""
    observed = observed_of(allocator, base, capacity)[:, None]
    nothing = torch.zeros_like(capacity)
    request = BudgetRequest(num_candidates, num_candidates, capacity, nothing)
    return allocator.kept_tokens(observed, request)[:, 0]
