# SPDX-License-Identifier: Apache-2.0
"""Score, allocate, select, merge and compact, for all prompts that end in a step.

Knows tensors, not vLLM.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import (
    Allocator,
    Demand,
    LayerAllocator,
    ModelAllocator,
    Scope,
    pages_from_kept,
)
from vllm_kvcompress.merging import Merge, MergeContext
from vllm_kvcompress.page_state import HeadPageState, page_starts
from vllm_kvcompress.scoring import (
    HiddenMoments,
    LayerContext,
    LayerTrace,
    QueryMoments,
    QueryProjector,
    Scorer,
    Scores,
)
from vllm_kvcompress.scoring.base import local_mean


class LayerInputs(NamedTuple):
    """What one layer hands to the pipeline.

    Attributes:
        layer: index in the model.
        row: index among the compressed layers.
        queries: [N, Q, Hq, D] of the last Q positions of each prompt.
        pages: [num_pages, block_size * 2 * D] head pages of the layer.
        scale, softcap: the layer's.
        key_scale, value_scale: see ``PageLayout``.
        key_attention_sum, hidden, moments, projector: see ``LayerContext``.
    """

    layer: int
    row: int
    queries: torch.Tensor
    pages: torch.Tensor
    scale: float
    softcap: float = 0.0
    key_scale: float = 1.0
    value_scale: float = 1.0
    key_attention_sum: torch.Tensor | None = None
    hidden: HiddenMoments | None = None
    moments: QueryMoments | None = None
    projector: QueryProjector | None = None


class Demands(NamedTuple):
    """Plans of the N prompts as device tensors, all [N] int64; see ``plan.PromptPlan``."""

    slots: torch.Tensor
    prompt_lens: torch.Tensor
    num_full_blocks: torch.Tensor
    num_kept_blocks: torch.Tensor
    tail: torch.Tensor
    capacity: torch.Tensor
    num_candidates: torch.Tensor
    pinned: torch.Tensor
    fixed: torch.Tensor
    recent: torch.Tensor
    instruction_len: torch.Tensor


class _Waiting(NamedTuple):
    """A layer that has been scored and waits for its share of a budget that spans layers."""

    prompts: kernels.PromptPages
    final: torch.Tensor
    observed: torch.Tensor


@dataclass
class EndingPrompts:
    """The N compressing requests whose prompt ends in this step.

    Attributes:
        demands: their plans.
        block_table: [N, B] int64 with B = ceil(longest prompt / block_size).
        max_pages: bound on any head's pages.
        total_pages: most pages, over all layers and heads, that one request keeps.
        visual: [N, T] bool, tokens that may compete; None when all may.
        segment: [N, T] int64, image of each visual token or -1; None when nothing needs it.
        num_segments: of the prompt that has the most.
        static_tokens: [N, L, Hkv] int64 scored tokens of a static allocator.
        trace: what layers of this step leave for later layers.
    """

    demands: Demands
    block_table: torch.Tensor
    max_pages: int
    total_pages: int
    visual: torch.Tensor | None = None
    segment: torch.Tensor | None = None
    num_segments: int = 0
    static_tokens: torch.Tensor | None = None
    trace: LayerTrace = field(default_factory=LayerTrace)
    _page_count: torch.Tensor | None = None  # [N, L, Hkv], budgets that span layers
    _staged: torch.Tensor | None = None  # [N, total_pages + 1, block_size * 2 * D]
    _waiting: list[_Waiting] = field(default_factory=list)


class CompressionPipeline:
    """Compresses one layer of all ending prompts at a time.

    Args:
        scorer, allocator, merge: the methods; ``merge`` None drops what is not kept.
        window: W.
        num_layers, num_kv_heads: compressed layers, and KV heads of this rank.
        layout: where a head page keeps its elements.
        state: receives the pages of every head.
        mean_over_heads: mean over dimension 1 of a tensor, over the heads of all ranks.
        first_head: index in the model of the rank's first KV head.
        mean_over_replicas: mean of scores [N, Hkv, T] over the ranks that hold the same KV head
            beside different query heads, so that all of them keep the same tokens.
    """

    def __init__(
        self,
        scorer: Scorer,
        allocator: Allocator,
        merge: Merge | None,
        window: int,
        num_layers: int,
        num_kv_heads: int,
        layout: kernels.PageLayout,
        state: HeadPageState,
        mean_over_heads: Callable[[torch.Tensor], torch.Tensor] = local_mean,
        first_head: int = 0,
        mean_over_replicas: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
    ) -> None:
        self.scorer = scorer
        self.allocator = allocator
        self.merge = merge
        self.window = window
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.layout = layout
        self.state = state
        self.mean_over_heads = mean_over_heads
        self.first_head = first_head
        self.mean_over_replicas = mean_over_replicas

    @property
    def spans_layers(self) -> bool:
        """Head pages of a layer may hold tokens of another one."""
        return self.allocator.scope in (Scope.STATIC, Scope.MODEL)

    def compress(
        self,
        batch: EndingPrompts,
        inputs: LayerInputs,
        all_pages: torch.Tensor | None = None,
        layer_pages: int = 0,
    ) -> torch.Tensor | None:
        """Score one layer, and compact whatever can be compacted by now, in place.

        Args:
            inputs: of the layer; layers come in order.
            all_pages, layer_pages: head pages of all layers, and pages from one layer to the next,
                when budgets span layers.

        Returns:
            [N, ...] int64, pages per head that became known; None when none did.
        """
        allocator, demands = self.allocator, batch.demands
        ctx = self._context(batch, inputs)
        scores = self._agreed(self.scorer.score(ctx))
        base, final = self._mask(batch, *scores)
        prompts = ctx.prompts
        if not self.spans_layers:
            if isinstance(allocator, LayerAllocator):
                tokens = allocator.head_budgets(base, demands.num_candidates, demands.capacity)
                kept = tokens + demands.pinned[:, None]
                count = self._pages(batch, kept)
                self.state.set_pages(inputs.row, demands.slots, count, page_starts(count))
            else:
                nominal = (demands.capacity + demands.pinned)[:, None]
                kept = nominal.expand(-1, self.num_kv_heads)
                count = demands.num_kept_blocks[:, None].expand_as(kept)
            staged = self._entries(batch, prompts, final, kept, count)
            self._write(batch, prompts, staged, count, page_starts(count))
            return count
        assert all_pages is not None, "budgets that span layers need a view of all of them"
        last = inputs.row == self.num_layers - 1
        if isinstance(allocator, ModelAllocator):
            observed = allocator.observe(ctx, scores._replace(base=base, final=final))
            batch._waiting.append(_Waiting(prompts, final, observed))
            if not last:
                return None
            demand = Demand(
                demands.prompt_lens, demands.num_candidates, demands.capacity, demands.pinned
            )
            kept = allocator.kept_tokens([w.observed for w in batch._waiting], demand)
            kept = kept[:, :, None].expand(-1, -1, self.num_kv_heads)
            self._settle(batch, kept)
            for row, waiting in enumerate(batch._waiting):
                self._stage(batch, waiting.prompts, waiting.final, row, kept[:, row])
        else:
            assert batch.static_tokens is not None
            kept = batch.static_tokens + demands.pinned[:, None, None]
            if batch._page_count is None:
                self._settle(batch, kept)
            self._stage(batch, prompts, final, inputs.row, kept[:, inputs.row])
            if not last:
                return None
        assert batch._staged is not None
        assert batch._page_count is not None
        num = len(demands.slots)
        total = demands.num_kept_blocks[:, None] * (self.num_layers * self.num_kv_heads)
        staged = batch._staged[:, :-1].reshape(num, 1, -1, 2 * self.layout.head_size)
        everything = prompts._replace(pages=all_pages)
        self._write(batch, everything, staged, total, torch.zeros_like(total), layer_pages)
        count = batch._page_count
        batch._staged, batch._waiting = None, []
        return count

    def _context(self, batch: EndingPrompts, inputs: LayerInputs) -> LayerContext:
        demands = batch.demands
        capacity = demands.capacity
        layout = self.layout._replace(key_scale=inputs.key_scale, value_scale=inputs.value_scale)
        if batch.static_tokens is not None and self.allocator.per_layer:
            capacity = batch.static_tokens[:, inputs.row, 0]
        return LayerContext(
            layer=inputs.layer,
            prompt_lens=demands.prompt_lens,
            capacity=capacity,
            window=self.window,
            queries=inputs.queries,
            prompts=kernels.PromptPages(inputs.pages, batch.block_table, self.num_kv_heads, layout),
            scale=inputs.scale,
            softcap=inputs.softcap,
            recent=demands.recent,
            instruction_len=demands.instruction_len,
            segment=batch.segment,
            num_segments=batch.num_segments,
            first_head=self.first_head,
            trace=batch.trace,
            key_attention_sum=inputs.key_attention_sum,
            hidden=inputs.hidden,
            moments=inputs.moments,
            projector=inputs.projector,
            mean_over_heads=self.mean_over_heads,
        )

    def _agreed(self, scores: Scores) -> Scores:
        """The same scores on all ranks that hold the same KV heads."""
        base = self.mean_over_replicas(scores.base)
        is_one = scores.final is scores.base
        return Scores(base, base if is_one else self.mean_over_replicas(scores.final))

    def _mask(
        self, batch: EndingPrompts, base: torch.Tensor, final: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-inf in ``base`` where nothing competes, +inf in ``final`` at text that is kept."""
        demands = batch.demands
        position = torch.arange(base.shape[2], device=base.device)
        competes = position < (demands.prompt_lens - demands.recent)[:, None]
        if batch.visual is not None:
            final = final.masked_fill(~batch.visual[:, None], float("inf"))
            competes = competes & batch.visual
        return base.masked_fill(~competes[:, None], float("-inf")), final

    def _pages(self, batch: EndingPrompts, kept: torch.Tensor) -> torch.Tensor:
        """Pages of the entries [N, X] of a group that shares its pages."""
        demands = batch.demands
        return pages_from_kept(
            kept,
            demands.tail,
            demands.fixed,
            demands.num_kept_blocks,
            demands.num_full_blocks,
            self.layout.block_size,
        )

    def _settle(self, batch: EndingPrompts, kept: torch.Tensor) -> None:
        """Pages of every layer and head, from kept tokens [N, L, Hkv]."""
        if self.allocator.per_layer:
            count = self._pages(batch, kept[:, :, 0])[:, :, None].expand_as(kept)
        else:
            count = self._pages(batch, kept.flatten(1)).view_as(kept)
        starts = page_starts(count.flatten(1)).view_as(count)
        self.state.set_all_pages(batch.demands.slots, count, starts)
        batch._page_count = count

    def _stage(
        self,
        batch: EndingPrompts,
        prompts: kernels.PromptPages,
        final: torch.Tensor,
        row: int,
        kept: torch.Tensor,
    ) -> None:
        """Copy the entries of one layer to their places among those of all layers."""
        assert batch._page_count is not None
        count = batch._page_count[:, row]
        staged = self._entries(batch, prompts, final, kept, count)
        num, width = len(staged), self.layout.block_size * 2 * self.layout.head_size
        if batch._staged is None:
            # the last page takes what no head owns
            batch._staged = staged.new_empty((num, batch.total_pages + 1, width))
        pages = staged.reshape(num, self.num_kv_heads, -1, width)
        index = torch.arange(pages.shape[2], device=staged.device)
        starts = page_starts(batch._page_count.flatten(1)).view_as(batch._page_count)[:, row]
        target = starts[:, :, None] + index
        target = target.masked_fill(index >= count[:, :, None], batch.total_pages)
        batch._staged[torch.arange(num, device=staged.device)[:, None, None], target] = pages

    def _entries(
        self,
        batch: EndingPrompts,
        prompts: kernels.PromptPages,
        final: torch.Tensor,
        kept: torch.Tensor,
        page_count: torch.Tensor,
    ) -> torch.Tensor:
        """What the pages of each head will hold, [N, Hkv, max_pages * block_size, 2 * D].

        Args:
            kept: [N, Hkv] kept tokens of each head as its allocator meant them.
            page_count: [N, Hkv] its pages.
        """
        demands = batch.demands
        position = torch.arange(final.shape[2], device=final.device)
        if self.scorer.recent_fraction:
            recent = (kept * self.scorer.recent_fraction).long().clamp_min(1)
            is_recent = position >= demands.prompt_lens[:, None, None] - recent[:, :, None]
            final = final.masked_fill(is_recent, float("inf"))
        in_pages = demands.num_full_blocks * self.layout.block_size
        candidates = torch.minimum(in_pages, demands.prompt_lens - demands.recent)
        slots = page_count * self.layout.block_size
        max_slots = batch.max_pages * self.layout.block_size
        if self.merge is None:
            chosen = kernels.select_tokens(final, slots, candidates, in_pages, max_slots)
            return kernels.stage_tokens(prompts, chosen, slots)
        competes = position < candidates[:, None]
        if batch.visual is not None:
            competes = competes & batch.visual
        is_prompt = (position < demands.prompt_lens[:, None])[:, None, :, None]
        read = (kernels.read_prompt(prompts, part).float() for part in ("key", "value"))
        keys, values = (rows.masked_fill(~is_prompt, 0.0) for rows in read)
        pinned = ~competes[:, None] & (position < in_pages[:, None])[:, None]
        ctx = MergeContext(
            keys=keys,
            values=values,
            final=final.masked_fill(pinned, float("inf")),
            competes=competes,
            prompt_lens=demands.prompt_lens,
            in_pages=in_pages,
            segment=batch.segment,
            num_segments=batch.num_segments,
            slots=slots,
        )
        tokens = self.merge.num_tokens(ctx)
        ctx.kept = kernels.select_tokens(final, tokens, candidates, in_pages, max_slots)
        return kernels.as_stored(prompts, *self.merge.merge(ctx))

    def _write(
        self,
        batch: EndingPrompts,
        prompts: kernels.PromptPages,
        staged: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
        layer_pages: int = 0,
    ) -> None:
        demands = batch.demands
        kernels.write_pages(
            prompts,
            staged,
            count,
            start,
            demands.num_full_blocks,
            demands.num_kept_blocks,
            layer_pages,
        )
