# SPDX-License-Identifier: Apache-2.0
"""What an allocator decides."""

import abc
import enum
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_kvcompress.scoring.base import LayerContext, Need, Scores


class Scope(enum.Enum):
    """When an allocator decides, and what may differ."""

    EVEN = "every head of every layer alike, known from the prompt length"
    STATIC = "per layer and head, known from the prompt length"
    LAYER = "per head, from the scores of its layer"
    MODEL = "per layer, from the scores of all layers"


class Demand(NamedTuple):
    """What N prompts offer to share out; all [N] int64 on the device.

    Attributes:
        prompt_lens: P.
        num_candidates: tokens that compete.
        capacity: nominal competing tokens a head keeps.
        pinned: tokens that every head keeps anyway; capacity + pinned is the nominal total.
    """

    prompt_lens: torch.Tensor
    num_candidates: torch.Tensor
    capacity: torch.Tensor
    pinned: torch.Tensor


@dataclass(frozen=True)
class Allocator(abc.ABC):
    """Shares a budget out: a frozen dataclass whose fields are its options.

    Class attributes:
        cost: as ``Scorer.cost``.
        needs: captured for the allocator.
        reconstruction: parts of the method are our proposal, because no formula was published.
        per_layer: all heads of a layer get the same.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    scope: ClassVar[Scope]
    reconstruction: ClassVar[bool] = False
    per_layer: ClassVar[bool] = True
    needs: ClassVar[Need] = Need(0)

    def check_model(self, num_layers: int, num_query_heads: int) -> None:  # noqa: B027
        """Compare files among the options with the model (all ranks), when an engine starts.

        Raises:
            ValueError: a file was made for another model.
        """


@dataclass(frozen=True)
class StaticAllocator(Allocator):
    """Decides on the host, before prefill."""

    scope = Scope.STATIC

    @abc.abstractmethod
    def head_budgets(
        self, capacity: int, num_candidates: int, num_layers: int, num_heads: int
    ) -> list[list[int]]:
        """Scored tokens C[l][g] of every layer and KV head of the model (all ranks).

        Args:
            capacity: b, nominal scored tokens per head; less than ``num_candidates``.
            num_candidates: n.
        """


@dataclass(frozen=True)
class LayerAllocator(Allocator):
    """Decides per layer, on the device."""

    scope = Scope.LAYER
    per_layer = False

    @abc.abstractmethod
    def head_budgets(
        self, base: torch.Tensor, num_candidates: torch.Tensor, capacity: torch.Tensor
    ) -> torch.Tensor:
        """Scored tokens of each head, [N, Hkv] int64.

        Args:
            base: [N, Hkv, T] float32 base scores, -inf at tokens that do not compete.
            num_candidates: [N] int64, n.
            capacity: [N] int64, nominal scored tokens per head; capacity <= n.
        """


@dataclass(frozen=True)
class ModelAllocator(Allocator):
    """Decides once all layers have been scored, on the device."""

    scope = Scope.MODEL

    @abc.abstractmethod
    def observe(self, ctx: LayerContext, scores: Scores) -> torch.Tensor:
        """What one layer contributes to the decision, [N, ...]."""

    @abc.abstractmethod
    def kept_tokens(self, observed: list[torch.Tensor], demand: Demand) -> torch.Tensor:
        """Tokens that every head of each layer keeps, pinned ones included, [N, L] int64.

        Args:
            observed: one entry per layer, in order.
        """
