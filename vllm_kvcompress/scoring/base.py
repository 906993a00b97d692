# SPDX-License-Identifier: Apache-2.0
"""What a scorer sees and what it returns."""

import abc
import enum
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from vllm_kvcompress.kernels import PromptPages


class Need(enum.Flag):
    """What must be at hand when a scorer runs; nothing else is captured or read."""

    KEYS = enum.auto()
    VALUES = enum.auto()
    WINDOW_QUERIES = enum.auto()
    LAYER_TRACE = enum.auto()


class LayerTrace:
    """Per-layer tensors that later layers of the same forward pass look back at.

    It lives and dies with the step in which the prompts end, and its rows are the requests of that
    step: no request can see another one's trace, or its own from before a preemption.
    """

    def __init__(self) -> None:
        self._by_layer: dict[int, torch.Tensor] = {}

    def record(self, layer: int, value: torch.Tensor) -> None:
        self._by_layer[layer] = value

    def previous(self, layer: int, reach: int) -> list[torch.Tensor]:
        """Recorded values of layers [layer - reach, layer), oldest first."""
        for old in [j for j in self._by_layer if j < layer - reach]:
            del self._by_layer[old]
        return [self._by_layer[j] for j in sorted(self._by_layer) if j < layer]


@dataclass
class LayerContext:
    """One layer of all requests whose prompt ends in this step (N rows).

    Attributes:
        layer: index of the layer in the model.
        prompt_lens: [N] int64, P.
        capacity: [N] int64, nominal scored tokens per head, budget - W.
        window: W.
        window_queries: [N, W, Hq, D], queries of positions P-W .. P-1, after norm and RoPE.
        prompts: pages of the prompts' keys and values; T is the longest prompt rounded up to
            blocks, and what stands at t >= P is garbage.
        scale, softcap: the model's logit scale and soft cap (0: none).
        trace: shared by all layers of this step.
    """

    layer: int
    prompt_lens: torch.Tensor
    capacity: torch.Tensor
    window: int
    window_queries: torch.Tensor
    prompts: PromptPages
    scale: float
    softcap: float = 0.0
    trace: LayerTrace = field(default_factory=LayerTrace)

    @property
    def num_scored(self) -> torch.Tensor:
        """[N] int64, n = P - W: the scored prefix."""
        return self.prompt_lens - self.window


class Scores(NamedTuple):
    """Scores of the prefix, larger = keep, -inf at t >= n.

    ``base`` is the plain importance that budgets are counted on, ``final`` ranks inside a head.
    Both [N, Hkv, T] float32.
    """

    base: torch.Tensor
    final: torch.Tensor


@dataclass(frozen=True)
class Scorer(abc.ABC):
    """A scoring method: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[Need]

    @abc.abstractmethod
    def score(self, ctx: LayerContext) -> Scores:
        """Score the prefix of every request of the context."""
