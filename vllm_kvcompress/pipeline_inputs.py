# SPDX-License-Identifier: Apache-2.0
"""What the pipeline is given: N finished prompts, what L layers kept of them; and their scores."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_kvcompress.scoring import HiddenMoments, QueryMoments, QueryProjector, ScoringContext
from vllm_kvcompress.scoring.base import rows_of


class PromptBatch(NamedTuple):
    """Plans of N prompts as device tensors, all [N] int64; see ``plan.PromptPlan``.

    ``slots`` are the requests' slots in the ``HeadPageState``.
    """

    slots: torch.Tensor
    prompt_lens: torch.Tensor
    num_full_blocks: torch.Tensor
    num_kept_blocks: torch.Tensor
    tail: torch.Tensor
    capacity: torch.Tensor
    num_candidates: torch.Tensor
    num_protected: torch.Tensor
    num_protected_in_blocks: torch.Tensor
    num_recent: torch.Tensor
    instruction_len: torch.Tensor


@dataclass(frozen=True)
class FinishedPrefills:
    """N prompts that are prefilled and wait for their compression.

    Attributes:
        batch: their plans.
        block_table: [N, B] int64 with B = ceil(longest prompt / block_size).
        max_pages: bound on the pages of one head in one layer.
        pages_per_layer: most kept head pages per layer of any prompt, num_kept_blocks * Hkv.
        visual: [N, T] bool, tokens that may compete; None when all may.
        segment: [N, T] int64, image of each visual token or -1; None when nothing needs it.
        num_segments: of the prompt that has the most.
        grids: [N, max(num_segments, 1), 4] int64, see ``kernels.Grids``; None when nothing needs
            them.
        head_budgets: [N, L, Hkv] competing tokens that heads keep; None unless a static allocator
            knows them.
    """

    batch: PromptBatch
    block_table: torch.Tensor
    max_pages: int
    pages_per_layer: int
    visual: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    num_segments: int = 0
    grids: torch.Tensor | None = None
    head_budgets: torch.Tensor | None = None

    def of_prompts(self, prompts: slice) -> "FinishedPrefills":
        parts = (self.visual, self.segment, self.grids, self.head_budgets)
        visual, segment, grids, budgets = (rows_of(part, prompts) for part in parts)
        return replace(
            self,
            batch=rows_of(self.batch, prompts),
            block_table=self.block_table[prompts],
            visual=visual,
            segment=segment,
            grids=grids,
            head_budgets=budgets,
        )


class LayerStack(NamedTuple):
    """What the L compressed layers hand over for N prompts.

    Attributes:
        layers: their indices in the model, ascending.
        queries: [L, N, Q, Hq, D] of the last Q positions of each prompt.
        pages: [num_pages, block_size * 2 * D] head pages of all layers.
        layer_pages: pages from one layer to the next, a multiple of Hkv.
        scale: [L] float32, of the logits.
        softcap: of the logits (0: none).
        key_scale, value_scale: [L] float32, see ``PromptPages``.
        key_attention_sum: [L, N, Hkv, T'] with T' >= T, see ``ScoringContext``.
        hidden, moments: of R = L * N rows, layer by layer.
        projector: of the L layers and N prompts.
        output_grams: [L, Hq, D, D], see ``ScoringContext``.
    """

    layers: tuple[int, ...]
    queries: torch.Tensor
    pages: torch.Tensor
    layer_pages: int
    scale: torch.Tensor
    softcap: float = 0.0
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    key_attention_sum: torch.Tensor | None = None
    hidden: HiddenMoments | None = None
    moments: QueryMoments | None = None
    projector: QueryProjector | None = None
    output_grams: torch.Tensor | None = None

    def of_prompts(self, prompts: slice) -> "LayerStack":
        def some(rows: torch.Tensor) -> torch.Tensor:
            by_layer = rows.unflatten(0, (len(self.layers), -1))
            return by_layer[:, prompts].flatten(0, 1)

        sums, hidden, moments = self.key_attention_sum, self.hidden, self.moments
        return self._replace(
            queries=self.queries[:, prompts],
            key_attention_sum=None if sums is None else sums[:, prompts],
            hidden=None if hidden is None else HiddenMoments(*map(some, hidden)),
            moments=None if moments is None else QueryMoments(*map(some, moments)),
            projector=None if self.projector is None else self.projector.of_prompts(prompts),
        )


class ScoredLayers(NamedTuple):
    """Consecutive layers that are scored together, [first, last) of the stack.

    Attributes:
        batch: plans of the rows, [R] each.
        final: [R, Hkv, T] ranking scores.
    """

    first: int
    last: int
    ctx: ScoringContext
    batch: PromptBatch
    final: torch.Tensor
