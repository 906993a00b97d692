# SPDX-License-Identifier: Apache-2.0
"""What an allocator decides."""

import abc
import enum
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_kvcompress.scoring.base import Need, Scores, ScoringContext
from vllm_kvcompress.workspace import RowShape


class Scope(enum.Enum):
    """What a budget may depend on, and among whom it may differ."""

    UNIFORM = "every head of every layer alike, known from the prompt length"
    STATIC = "per layer and head, known from the prompt length"
    LAYER = "per head, from the scores of its layer"
    MODEL = "per layer, from the scores of all layers"

    @property
    def spans_layers(self) -> bool:
        """Whether one layer may get what another one does not."""
        return self in (Scope.STATIC, Scope.MODEL)

    @property
    def needs_scores(self) -> bool:
        return self in (Scope.LAYER, Scope.MODEL)


class BudgetRequest(NamedTuple):
    """What N prompts offer to share out; int64 on the device.

    Attributes:
        prompt_lens: [N], P.
        num_candidates: [N], tokens that compete.
        capacity: [N], nominal competing tokens a head keeps.
        num_protected: [N], tokens that every head keeps anyway; capacity + num_protected is the
            nominal total.
        head_budgets: [N, L, Hkv] of a static allocator, else None.
    """

    prompt_lens: torch.Tensor
    num_candidates: torch.Tensor
    capacity: torch.Tensor
    num_protected: torch.Tensor
    head_budgets: torch.Tensor | None = None


@dataclass(frozen=True)
class Allocator(abc.ABC):
    """Shares a budget out: a frozen dataclass whose fields are its options.

    An allocator that looks at scores says with ``observe`` what it needs of them, and decides with
    ``kept_tokens`` when all layers have been observed.

    Class attributes:
        cost: as ``Scorer.cost``.
        needs: stored or read for the allocator.
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

    def observe(self, ctx: ScoringContext, scores: Scores) -> torch.Tensor:
        """What each row contributes to the decision, [R, ...]; asked if the scope needs scores.

        Args:
            scores: base is -inf at tokens that do not compete.
        """
        raise NotImplementedError(f"{self.name} looks at no scores")

    @abc.abstractmethod
    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        """Tokens that each head keeps, protected ones included, int64.

        Args:
            observed: [N, L, ...] of ``observe``, None if the scope needs no scores.

        Returns:
            [N, L, Hkv]; L and Hkv may be 1 where all layers or heads are alike.
        """

    def workspace(self, row: RowShape) -> int:
        """Float32 elements that observing one row holds at its peak."""
        return 0

    def decision_workspace(self, row: RowShape) -> int:
        """Float32 elements that the decision holds at its peak, per row that was observed."""
        return 0


@dataclass(frozen=True)
class StaticAllocator(Allocator):
    """Decides on the host, before prefill."""

    scope = Scope.STATIC

    @abc.abstractmethod
    def head_budgets(
        self, capacity: int, num_candidates: int, num_layers: int, num_heads: int
    ) -> list[list[int]]:
        """Competing tokens C[l][g] that every layer and KV head of the model keeps (all ranks).

        Args:
            capacity: b, nominal competing tokens that a head keeps; less than ``num_candidates``.
            num_candidates: n.
        """

    def kept_tokens(self, observed: torch.Tensor | None, request: BudgetRequest) -> torch.Tensor:
        assert request.head_budgets is not None, "a static budget is known before prefill"
        return request.head_budgets + request.num_protected[:, None, None]
