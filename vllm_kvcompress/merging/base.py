# SPDX-License-Identifier: Apache-2.0
"""What a merge sees and what it returns."""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_kvcompress.workspace import RowShape


@dataclass
class MergeContext:
    """Kept entries of R (layer, prompt) rows, before they are written to their head pages.

    Merging happens inside the full blocks of a prompt: positions below ``in_pages`` are sources and
    targets; later ones are in the tail block and stay as they are.

    Attributes:
        keys, values: [R, Hkv, T, D] float32 of the prompts, 0 at t >= P.
        final: [R, Hkv, T] float32 ranking scores, +inf at tokens that are always kept.
        competes: [R, T] bool, tokens below in_pages that may be dropped.
        prompt_lens, in_pages: [R] int64, P and m * block_size.
        segment: [R, T] int64, index of the image of a visual token, else -1; None if the merge does
            not need it.
        num_segments: segments of the prompt that has the most.
        slots: [R, Hkv] int64, entries that each head's pages hold.
        kept: [R, Hkv, K] int64, kept positions below in_pages, ascending; T in unused entries,
            which follow the used ones. Set once ``num_tokens`` has been asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    final: torch.Tensor
    competes: torch.Tensor
    prompt_lens: torch.Tensor
    in_pages: torch.Tensor
    segment: torch.Tensor | None
    num_segments: int
    slots: torch.Tensor
    kept: torch.Tensor | None = None


@dataclass(frozen=True)
class Merge(abc.ABC):
    """What becomes of dropped tokens: a frozen dataclass whose fields are its options.

    Class attributes:
        cost: as ``Scorer.cost``.
        reconstruction: no formula was published; the method is our proposal.
        needs_segments: reads ``MergeContext.segment``.
        needs_shared_sets: all heads of a layer must keep the same tokens.
        needs_weights: scores must be weights (``Scorer.weighs``).
    """

    name: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    reconstruction: ClassVar[bool] = False
    needs_segments: ClassVar[bool] = False
    needs_shared_sets: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    def num_tokens(self, ctx: MergeContext) -> torch.Tensor:
        """How many of a head's slots hold tokens, [R, Hkv] int64; the merge fills the others."""
        return ctx.slots

    @abc.abstractmethod
    def workspace(self, row: RowShape, num_slots: int) -> int:
        """Float32 elements that one row holds at its peak; ``num_slots`` of all its heads."""

    @abc.abstractmethod
    def merge(self, ctx: MergeContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries for the slots: keys and values [R, Hkv, K, D] float32, in slot order.

        What stands in unused entries does not matter.
        """
