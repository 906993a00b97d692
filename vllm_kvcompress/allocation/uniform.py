# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.allocation.base import Allocator, BudgetRequest, Scope


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every head of every layer keeps the nominal capacity. Source: SnapKV, arXiv 2404.14469."""

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    cost: ClassVar[str] = "none"
    scope: ClassVar[Scope] = Scope.UNIFORM

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        return (request.capacity + request.num_protected)[:, None, None]
