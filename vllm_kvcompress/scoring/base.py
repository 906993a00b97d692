# SPDX-License-Identifier: Apache-2.0
"""What a scorer sees and what it returns."""

import abc
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import PromptPages


class Need(enum.Flag):
    """What must be at hand when a method runs; nothing else is captured or read."""

    KEYS = enum.auto()
    VALUES = enum.auto()
    WINDOW_QUERIES = enum.auto()
    INSTRUCTION_QUERIES = enum.auto()
    LAST_QUERY = enum.auto()
    SEGMENTS = enum.auto()
    LAYER_TRACE = enum.auto()
    KEY_ATTENTION_SUMS = enum.auto()
    HIDDEN_MOMENTS = enum.auto()
    QUERY_MOMENTS = enum.auto()

    @property
    def all_rows(self) -> bool:
        """Needs something of every prompt token, which a cached prefix no longer shows."""
        return bool(self & (Need.KEY_ATTENTION_SUMS | Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS))


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


@dataclass(frozen=True)
class HiddenMoments:
    """Sums over the prompt's tokens of the (normed) attention input x, float32.

    Attributes:
        count: [N] tokens summed over.
        total, square: [N, d] sums of x and of x^2.
        last: [N, d] x of the last prompt token.
    """

    count: torch.Tensor
    total: torch.Tensor
    square: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class QueryMoments:
    """Sums over the prompt's tokens of the queries before RoPE and after their norm, float32.

    Attributes:
        count: [N] tokens summed over.
        total: [N, Hq, D].
        outer: [N, Hq, D, D], sums of q q^T.
    """

    count: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor


class QueryProjector(Protocol):
    """The layer's own way from hidden states to queries at positions after the prompt.

    Position 0 of the offsets is the last prompt token's; under M-RoPE the largest of its components
    counts, and all components of the new position are equal.
    """

    def project(self, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[N, M, d] float32 and offsets [M] int64 -> rotated queries [N, M, Hq, D] float32."""

    def rotate(self, queries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """RoPE of [N, M, H, D] float32 at offsets [M] int64."""


def local_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over dimension 1, the heads, on a single rank."""
    return values.mean(1)


@dataclass
class LayerContext:
    """One layer of all requests whose prompt ends in this step (N rows).

    T is the longest prompt rounded up to blocks; tensors over T hold garbage or zeros at t >= P.

    Attributes:
        layer: index of the layer in the model.
        prompt_lens: [N] int64, P.
        capacity: [N] int64, nominal scored tokens per head of this layer.
        window: W.
        queries: [N, Q, Hq, D], after norm and RoPE, of positions P-Q .. P-1, Q >= W if the window
            is needed; rows that no method asked for hold garbage.
        prompts: pages of the prompts' keys and values.
        scale, softcap: the model's logit scale and soft cap (0: none).
        recent: [N] int64, R: the last R tokens are always kept (``Scorer.num_recent``).
        instruction_len: [N] int64, how many of the last rows belong to the instruction
            (``PromptFacts.num_instruction_tokens``).
        segment: [N, T] int64, index of the image (or temporal patch) of a visual token, else -1.
        num_segments: segments of the prompt that has the most.
        first_head: index in the model of the rank's first KV head.
        trace: shared by all layers of this step.
        key_attention_sum: [N, Hkv, T] float32, attention that key t received from all rows
            i >= t, mean over the query heads of a group.
        hidden, moments, projector: see their types.
        mean_over_heads: mean over dimension 1 of a tensor, over the heads of all ranks.
    """

    layer: int
    prompt_lens: torch.Tensor
    capacity: torch.Tensor
    window: int
    queries: torch.Tensor
    prompts: PromptPages
    scale: float
    softcap: float = 0.0
    recent: torch.Tensor | None = None
    instruction_len: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    num_segments: int = 0
    first_head: int = 0
    trace: LayerTrace = field(default_factory=LayerTrace)
    key_attention_sum: torch.Tensor | None = None
    hidden: HiddenMoments | None = None
    moments: QueryMoments | None = None
    projector: QueryProjector | None = None
    mean_over_heads: Callable[[torch.Tensor], torch.Tensor] = local_mean

    @property
    def num_candidates(self) -> torch.Tensor:
        """[N] int64, n = P - W: the prefix before the window."""
        return self.prompt_lens - self.window

    @property
    def window_queries(self) -> torch.Tensor:
        """[N, W, Hq, D], queries of positions P-W .. P-1."""
        return self.queries[:, self.queries.shape[1] - self.window :]

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64."""
        length = self.prompts.block_table.shape[1] * self.prompts.layout.block_size
        return torch.arange(length, device=self.prompt_lens.device)

    @cached_property
    def is_prompt(self) -> torch.Tensor:
        """[N, T] bool, t < P."""
        return self.positions < self.prompt_lens[:, None]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[N, Hkv, T, D] float32, 0 at t >= P."""
        return self._read("key")

    @cached_property
    def values(self) -> torch.Tensor:
        """[N, Hkv, T, D] float32, 0 at t >= P."""
        return self._read("value")

    def _read(self, part: str) -> torch.Tensor:
        rows = kernels.read_prompt(self.prompts, part).float()
        return rows.masked_fill(~self.is_prompt[:, None, :, None], 0.0)


class Scores(NamedTuple):
    """Scores of the prompt's tokens, larger = keep.

    ``base`` is the plain importance that budgets are counted on, ``final`` ranks inside a head.
    Both [N, Hkv, T] float32. What stands at tokens that are kept or barred anyway (the last R, and
    text where only visual tokens compete) and at t >= P does not matter.
    """

    base: torch.Tensor
    final: torch.Tensor


@dataclass(frozen=True)
class Scorer(abc.ABC):
    """A scoring method: a frozen dataclass whose fields are its options.

    Class attributes:
        cost: floating-point operations per request, in the symbols of docs/methods.md.
        needs: captured for the scorer; nothing else is.
        reconstruction: no formula was published; the method is our proposal.
        visual_only: only visual tokens compete unless the user says otherwise.
        shared_sets: all heads of a layer keep the same tokens.
        countable: the base score can be counted on across heads (adakv).
        weighs: final scores are finite and not negative, so that they can weigh tokens.
        recent_fraction: share of a head's kept tokens that are its most recent ones, 0 for none.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[Need]
    reconstruction: ClassVar[bool] = False
    visual_only: ClassVar[bool] = False
    shared_sets: ClassVar[bool] = False
    countable: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    recent_fraction: ClassVar[float] = 0.0

    def num_recent(self, window: int, kept: int) -> int:
        """R: the last R prompt tokens are always kept. ``kept``: nominal tokens per head."""
        return window

    @property
    def lookahead(self) -> int:
        """How many positions past the prompt the method asks the query projector for."""
        return 0

    def stats_from(self, prompt_len: int) -> int:
        """First position whose row counts in moments."""
        return 0

    @abc.abstractmethod
    def score(self, ctx: LayerContext) -> Scores:
        """Score every prompt of the context."""
