# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.allocation.base import Allocator


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every head of every layer keeps the nominal capacity. Source: SnapKV, arXiv 2404.14469."""

    name: ClassVar[str] = "uniform"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    even: ClassVar[bool] = True

    def allocate(
        self, base: torch.Tensor, num_scored: torch.Tensor, capacity: torch.Tensor
    ) -> torch.Tensor:
        return capacity[:, None].expand(base.shape[:2])
