# SPDX-License-Identifier: Apache-2.0
"""What a scorer sees and what it returns."""

import abc
import dataclasses
import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import PromptPages
from vllm_kvcompress.workspace import RowShape


class Need(enum.Flag):
    """What must be at hand when a method runs; nothing else is stored or read."""

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
    GRIDS = enum.auto()
    OUTPUT_GRAMS = enum.auto()

    @property
    def statistics(self) -> "Need":
        """What is summed over the tokens of a prompt, among all that is needed."""
        return self & (Need.KEY_ATTENTION_SUMS | Need.HIDDEN_MOMENTS | Need.QUERY_MOMENTS)

    @property
    def all_rows(self) -> bool:
        """Needs something of every prompt token, which a cached prefix no longer shows."""
        return bool(self.statistics)


class LayerTrace:
    """What layers leave for later layers of the same prompts, where these are scored in groups.

    It lives and dies with one call of the pipeline: no prompt can see another one's trace.
    """

    def __init__(self) -> None:
        self._earlier: torch.Tensor | None = None

    def extend(self, layers: torch.Tensor, reach: int) -> torch.Tensor:
        """The last ``reach`` layers of earlier groups, followed by those of this one.

        Args:
            layers: [L, N, ...] of the group's layers, in order.

        Returns:
            [Lt, N, ...] with Lt >= L.
        """
        if self._earlier is not None:
            layers = torch.cat([self._earlier, layers])
        self._earlier = layers[max(len(layers) - reach, 0) :]
        return layers


class HiddenMoments(NamedTuple):
    """Sums over the prompt's tokens of the (normed) attention input x, float32.

    Attributes:
        num_tokens: [R] tokens summed over.
        total, square: [R, d] sums of x and of x^2.
        last: [R, d] x of the last prompt token.
    """

    num_tokens: torch.Tensor
    total: torch.Tensor
    square: torch.Tensor
    last: torch.Tensor


class QueryMoments(NamedTuple):
    """Sums over the prompt's tokens of the queries before RoPE and after their norm, float32.

    Attributes:
        num_tokens: [R] tokens summed over.
        total: [R, Hq, D].
        outer: [R, Hq, D, D], sums of q q^T.
    """

    num_tokens: torch.Tensor
    total: torch.Tensor
    outer: torch.Tensor


class QueryProjector(Protocol):
    """The layers' own way from hidden states to queries at positions after the prompts.

    Position 0 of the offsets is the last prompt token's; under M-RoPE the largest of its components
    counts, and all components of the new position are equal. ``layers`` count from 0 in the stack
    of compressed layers; R = len(layers) * N rows, layer by layer.
    """

    def project(self, layers: range, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """[R, M, d] float32 and offsets [M] int64 -> rotated queries [R, M, Hq, D] float32."""

    def rotate(self, layers: range, queries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """RoPE of [R, M, H, D] float32 at offsets [M] int64."""

    def shares_rotation(self, layers: range) -> bool:
        """Whether all of the layers rotate alike: what one of them rotates serves the others."""

    def of_prompts(self, prompts: slice) -> "QueryProjector":
        """The same for some of the N prompts."""


def local_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over dimension 1, the heads, on a single rank."""
    return values.mean(1)


@dataclass
class ScoringContext:
    """Some layers of N finished prompts: R rows, each one layer of one prompt.

    Row l * N + n is layer l of prompt n, and the rows do not know of each other. T is the longest
    prompt rounded up to blocks; tensors over T hold garbage or zeros at t >= P.

    Attributes:
        layers: indices in the model of the layers; R = len(layers) * N.
        stack: positions of the layers among all compressed layers.
        prompt_lens: [R] int64, P.
        capacity: [R] int64, nominal competing tokens per head of the row's layer.
        window: W.
        queries: [R, Q, Hq, D], after norm and RoPE, of positions P-Q .. P-1, Q >= W if the window
            is needed; queries that no method asked for hold garbage.
        prompts: pages of the rows' keys and values.
        scale: [R] float32, of the layer's logits.
        softcap: of the logits (0: none).
        num_recent: [R] int64, how many last tokens are always kept (``Scorer.num_recent``).
        instruction_len: [R] int64, how many of the last tokens belong to the instruction
            (``PromptFacts.num_instruction_tokens``).
        segment: [R, T] int64, index of the image (or temporal patch) of a visual token, else -1.
        num_segments: segments of the prompt that has the most.
        grids: [R, M, 4] int64 with M = max(num_segments, 1), see ``kernels.Grids``.
        output_grams: [L, Hq, D, D] float32, Wo^T Wo of each query head's part Wo of the layer's
            output projection.
        first_head: index in the model of the rank's first KV head.
        trace: what layers leave for later ones.
        key_attention_sum: [R, Hkv, T] float32, attention that key t received from all queries
            i >= t, mean over the query heads of a group.
        hidden, moments, projector: see their types.
        mean_over_heads: mean over dimension 1 of a tensor, over the heads of all ranks.
    """

    layers: tuple[int, ...]
    stack: range
    prompt_lens: torch.Tensor
    capacity: torch.Tensor
    window: int
    queries: torch.Tensor
    prompts: PromptPages
    scale: torch.Tensor
    softcap: float = 0.0
    num_recent: torch.Tensor | None = None
    instruction_len: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    num_segments: int = 0
    grids: torch.Tensor | None = None
    output_grams: torch.Tensor | None = None
    first_head: int = 0
    trace: LayerTrace = field(default_factory=LayerTrace)
    key_attention_sum: torch.Tensor | None = None
    hidden: HiddenMoments | None = None
    moments: QueryMoments | None = None
    projector: QueryProjector | None = None
    mean_over_heads: Callable[[torch.Tensor], torch.Tensor] = local_mean
    _shared: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def of_layers(self, start: int, stop: int) -> "ScoringContext":
        """The rows of the layers [start, stop) of this context."""
        if (start, stop) == (0, len(self.layers)):
            return self
        rows = slice(start * self.num_prompts, stop * self.num_prompts)
        names = [f.name for f in dataclasses.fields(self)]
        own = {name: rows_of(getattr(self, name), rows) for name in names if name in ROWS}
        own |= {"layers": self.layers[start:stop], "stack": self.stack[start:stop], "_shared": {}}
        own["output_grams"] = rows_of(self.output_grams, slice(start, stop))
        return dataclasses.replace(self, **own)

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.prompt_lens) // len(self.layers)

    @property
    def num_candidates(self) -> torch.Tensor:
        """[R] int64, n = P - W: the prefix before the window."""
        return self.prompt_lens - self.window

    @property
    def window_queries(self) -> torch.Tensor:
        """[R, W, Hq, D], queries of positions P-W .. P-1."""
        return self.queries[:, self.queries.shape[1] - self.window :]

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64."""
        length = self.prompts.block_table.shape[1] * self.prompts.layout.block_size
        return torch.arange(length, device=self.prompt_lens.device)

    @cached_property
    def is_prompt(self) -> torch.Tensor:
        """[R, T] bool, t < P."""
        return self.positions < self.prompt_lens[:, None]

    @cached_property
    def keys(self) -> torch.Tensor:
        """[R, Hkv, T, D] float32, 0 at t >= P."""
        return self._read("key")

    @cached_property
    def values(self) -> torch.Tensor:
        """[R, Hkv, T, D] float32, 0 at t >= P."""
        return self._read("value")

    def shared(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` returns, made once for all methods that name the same ``key``."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def release(self) -> None:
        """Free what was read or shared; it is made anew if it is asked for again."""
        self._shared.clear()
        for name in ("keys", "values"):
            self.__dict__.pop(name, None)

    def _read(self, part: str) -> torch.Tensor:
        rows = kernels.read_prompt(self.prompts, part).float()
        return rows.masked_fill(~self.is_prompt[:, None, :, None], 0.0)


ROWS = (
    "prompt_lens",
    "capacity",
    "queries",
    "prompts",
    "scale",
    "num_recent",
    "instruction_len",
    "segment",
    "grids",
    "key_attention_sum",
    "hidden",
    "moments",
)
"""Attributes of a context that have a dimension R."""


def rows_of(value: Any, rows: slice) -> Any:
    """Some rows of what has a dimension R."""
    if isinstance(value, torch.Tensor):
        return value[rows]
    if isinstance(value, PromptPages):
        table, *scales = (
            rows_of(part, rows) for part in (value.block_table, value.key_scale, value.value_scale)
        )
        return value._replace(block_table=table, key_scale=scales[0], value_scale=scales[1])
    return None if value is None else type(value)(*(part[rows] for part in value))


class Scores(NamedTuple):
    """Scores of the prompt's tokens, larger = keep.

    ``base`` is the plain importance that budgets are counted on, ``final`` ranks inside a head.
    Both [R, Hkv, T] float32. Values at tokens that are kept or barred anyway (the last
    ``num_recent``, and text where only visual tokens compete) and at t >= P do not matter.
    """

    base: torch.Tensor
    final: torch.Tensor


@dataclass(frozen=True)
class Scorer(abc.ABC):
    """A scoring method: a frozen dataclass whose fields are its options.

    Class attributes:
        cost: floating-point operations per request, in the symbols of docs/methods.md.
        needs: stored or read for the scorer; nothing else is.
        reconstruction: no formula was published; the method is our proposal.
        visual_only: only visual tokens compete unless the user says otherwise.
        scores_text: text has scores as well, so the user may say otherwise.
        shared_sets: all heads of a layer keep the same tokens.
        countable: the base score can be counted on across heads (adakv).
        weighs: final scores are finite and not negative, so that they can weigh tokens.
        never_negative: no score is negative, though a few may be infinite, so that a factor raises
            it (das).
        recent_fraction: share of a head's kept tokens that are its most recent ones, 0 for none.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    needs: ClassVar[Need]
    reconstruction: ClassVar[bool] = False
    visual_only: ClassVar[bool] = False
    scores_text: ClassVar[bool] = True
    shared_sets: ClassVar[bool] = False
    countable: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    never_negative: ClassVar[bool] = False
    recent_fraction: ClassVar[float] = 0.0

    def num_recent(self, window: int, kept: int) -> int:
        """How many last prompt tokens are always kept. ``kept``: nominal tokens per head."""
        return window

    @property
    def text_first(self) -> bool:
        """All text is kept, and visual tokens compete for what it leaves of the budget."""
        return False

    @property
    def ranks_text_first(self) -> bool:
        """Text has to compete, because the scores put it before all visual tokens."""
        return False

    @property
    def lookahead(self) -> int:
        """How many positions past the prompt the method asks the query projector for."""
        return 0

    def stats_from(self, prompt_len: int) -> int:
        """First position whose token counts in moments."""
        return 0

    def workspace(self, row: RowShape) -> int:
        """Float32 elements that scoring one row holds at its peak, the scores included."""
        return 4 * row.scores

    def kept_for_good(self, hidden_size: int) -> int:
        """Float32 elements of each layer that stay on the device from its first prompt on."""
        return 0

    @abc.abstractmethod
    def score(self, ctx: ScoringContext) -> Scores:
        """Score every row of the context."""


SCORERS: dict[str, type[Scorer]] = {}
"""By name: those of this package, and what ``vllm_kvcompress.registry`` adds."""
