# SPDX-License-Identifier: Apache-2.0
"""Score, allocate, select, merge and compact: all layers of all finished prompts in one call.

Knows tensors, not vLLM.
"""

from collections.abc import Callable, Iterator

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.allocation import Allocator, BudgetRequest, Scope, pages_from_kept
from vllm_kvcompress.kernels import PromptPages
from vllm_kvcompress.merging import Merge, MergeContext
from vllm_kvcompress.page_state import HeadPageState, page_starts
from vllm_kvcompress.pipeline_inputs import (
    FinishedPrefills,
    LayerStack,
    PromptBatch,
    ScoredLayers,
)
from vllm_kvcompress.scoring import Scorer, Scores, ScoringContext
from vllm_kvcompress.scoring.base import local_mean, rows_of
from vllm_kvcompress.workspace import DEFAULT_BYTES, RowShape, Workspace

__all__ = ["CompressionPipeline", "FinishedPrefills", "LayerStack", "PromptBatch"]


class CompressionPipeline:
    """Compresses all layers of finished prompts at once.

    Args:
        scorer, allocator, merge: the methods; ``merge`` None drops what is not kept.
        window: W.
        num_kv_heads: KV heads of this rank.
        layout: where a head page keeps its elements.
        state: receives the pages of every head.
        mean_over_heads: mean over dimension 1 of a tensor, over the heads of all ranks.
        first_head: index in the model of the rank's first KV head.
        mean_over_replicas: mean of scores [R, Hkv, T] over the ranks that hold the same KV head
            beside different query heads, so that all of them keep the same tokens.
        workspace_bytes: bound on what one call holds besides its inputs. Where all layers of all
            prompts would take more, prompts go one after another, and layers in groups, with the
            same results. One layer of one prompt has to fit.
    """

    def __init__(
        self,
        scorer: Scorer,
        allocator: Allocator,
        merge: Merge | None,
        window: int,
        num_kv_heads: int,
        layout: kernels.PageLayout,
        state: HeadPageState,
        mean_over_heads: Callable[[torch.Tensor], torch.Tensor] = local_mean,
        first_head: int = 0,
        mean_over_replicas: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
        workspace_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.scorer = scorer
        self.allocator = allocator
        self.merge = merge
        self.window = window
        self.num_kv_heads = num_kv_heads
        self.layout = layout
        self.state = state
        self.mean_over_heads = mean_over_heads
        self.first_head = first_head
        self.mean_over_replicas = mean_over_replicas
        self.workspace_bytes = workspace_bytes

    def compress(self, prompts: FinishedPrefills, stack: LayerStack) -> torch.Tensor:
        """Compress the prompts in place and store their pages in the state.

        Returns:
            [N, L, Hkv] int64, pages of each head.
        """
        num_layers, num = len(stack.layers), len(prompts.block_table)
        workspace = self.workspace(prompts, stack)
        layers, together = workspace.split(self.workspace_bytes, num_layers, num)
        if together == num:
            return self._compress(prompts, stack, layers)
        parts = [slice(start, start + together) for start in range(0, num, together)]
        return torch.cat(
            [self._compress(prompts.of_prompts(p), stack.of_prompts(p), layers) for p in parts]
        )

    def workspace(self, prompts: FinishedPrefills, stack: LayerStack) -> Workspace:
        """What a call takes, an upper bound; kernels' own workspace is not counted."""
        block_size, head_size = self.layout.block_size, self.layout.head_size
        row = RowShape(
            length=prompts.block_table.shape[1] * block_size,
            num_q_heads=stack.queries.shape[3],
            num_kv_heads=self.num_kv_heads,
            head_size=head_size,
            num_queries=stack.queries.shape[2],
            hidden_size=0 if stack.hidden is None else stack.hidden.total.shape[1],
        )
        num_slots = self.num_kv_heads * prompts.max_pages * block_size
        page = block_size * 2 * head_size * stack.pages.itemsize
        # scores with what does not compete masked out, and those masks
        scoring = max(self.scorer.workspace(row), self.allocator.workspace(row) + 2 * row.scores)
        scoring = 4 * (scoring + 3 * row.scores)
        selecting = 8 * num_slots
        if self.scorer.recent_fraction:  # scores in which the recent ones are marked, and marks
            selecting += (4 + 1) * row.scores
        if self.merge is not None:
            merging = self.merge.workspace(row, num_slots) + 3 * row.keys
            selecting += 4 * merging + 8 * num_slots * head_size
        # of every layer: scores, block table, plan, numbers of each head, segments, what was
        # observed, sums in their order
        held = 4 * row.scores + 8 * prompts.block_table.shape[1]
        held += 8 * (len(PromptBatch._fields) + 8 * self.num_kv_heads)
        if prompts.segment is not None:
            held += 8 * row.length
        if prompts.grids is not None:
            held += 8 * prompts.grids[0].numel()
        held += 4 * self.allocator.decision_workspace(row)
        if stack.key_attention_sum is not None:
            held += 4 * row.scores
        num_layers = len(stack.layers)
        staged = (num_layers * prompts.pages_per_layer + 1) * page
        return Workspace(scoring, selecting, num_layers * held + 8 * row.length, staged)

    def _compress(
        self, prompts: FinishedPrefills, stack: LayerStack, layers_together: int
    ) -> torch.Tensor:
        batch, num_layers = prompts.batch, len(stack.layers)
        groups, observed = [], []
        for group, scores in self._score(prompts, stack, layers_together):
            groups.append(group)
            if self.allocator.scope.needs_scores:
                observed.append(self.allocator.observe(group.ctx, scores))
            del scores
            group.ctx.release()
        kept = self._kept_tokens(prompts, observed, num_layers)
        count = self._page_count(batch, kept)
        start = page_starts(count.flatten(1)).view_as(count)
        self.state.store(batch.slots, batch.num_full_blocks, batch.num_kept_blocks, count, start)
        # groups whose pages stay among their own layers are written before the next is staged
        if self.allocator.scope.spans_layers:
            self._compact(prompts, stack, groups, kept, count, start)
        else:
            for group in groups:
                self._compact(prompts, stack, [group], kept, count, start)
        return count

    def _score(
        self, prompts: FinishedPrefills, stack: LayerStack, layers_together: int
    ) -> Iterator[tuple[ScoredLayers, Scores]]:
        """Score group by group; the base scores are -inf where nothing competes."""
        num_layers, num = len(stack.layers), len(prompts.block_table)
        batch = PromptBatch(*torch.stack(prompts.batch).repeat(1, num_layers).unbind())
        whole = self._context(prompts, stack, batch)
        for first in range(0, num_layers, layers_together):
            last = min(first + layers_together, num_layers)
            ctx = whole.of_layers(first, last)
            rows = rows_of(batch, slice(first * num, last * num))
            base, final = self._agreed(self.scorer.score(ctx))
            competes = None
            if prompts.visual is not None:
                competes = prompts.visual.repeat(last - first, 1)
                final = final.masked_fill(~competes[:, None], float("inf"))
            if self.allocator.scope.needs_scores:
                before = ctx.positions < (rows.prompt_lens - rows.num_recent)[:, None]
                competes = before if competes is None else competes & before
                base = base.masked_fill(~competes[:, None], float("-inf"))
            yield ScoredLayers(first, last, ctx, rows, final), Scores(base, final)

    def _context(
        self, prompts: FinishedPrefills, stack: LayerStack, batch: PromptBatch
    ) -> ScoringContext:
        """All layers of all prompts; ``batch`` has a plan per row."""
        num_layers, num = stack.queries.shape[:2]
        device = stack.queries.device

        def per_row(by_layer: torch.Tensor | None) -> torch.Tensor | None:
            return None if by_layer is None else by_layer.repeat_interleave(num)

        capacity = batch.capacity
        if prompts.head_budgets is not None and self.allocator.per_layer:
            capacity = prompts.head_budgets[:, :, 0].t().flatten()
        blocks = torch.arange(num_layers, device=device) * (stack.layer_pages // self.num_kv_heads)
        block_table = (prompts.block_table + blocks[:, None, None]).flatten(0, 1)
        sums = stack.key_attention_sum
        return ScoringContext(
            layers=stack.layers,
            stack=range(num_layers),
            prompt_lens=batch.prompt_lens,
            capacity=capacity,
            window=self.window,
            queries=stack.queries.flatten(0, 1),
            prompts=PromptPages(
                stack.pages,
                block_table,
                self.num_kv_heads,
                self.layout,
                per_row(stack.key_scale),
                per_row(stack.value_scale),
            ),
            scale=stack.scale.repeat_interleave(num),
            softcap=stack.softcap,
            num_recent=batch.num_recent,
            instruction_len=batch.instruction_len,
            segment=None if prompts.segment is None else prompts.segment.repeat(num_layers, 1),
            num_segments=prompts.num_segments,
            grids=None if prompts.grids is None else prompts.grids.repeat(num_layers, 1, 1),
            output_grams=stack.output_grams,
            first_head=self.first_head,
            key_attention_sum=None
            if sums is None
            else sums[..., : block_table.shape[1] * self.layout.block_size].flatten(0, 1),
            hidden=stack.hidden,
            moments=stack.moments,
            projector=stack.projector,
            mean_over_heads=self.mean_over_heads,
        )

    def _agreed(self, scores: Scores) -> Scores:
        """The same scores on all ranks that hold the same KV heads."""
        base = self.mean_over_replicas(scores.base)
        is_one = scores.final is scores.base
        return Scores(base, base if is_one else self.mean_over_replicas(scores.final))

    def _kept_tokens(
        self, prompts: FinishedPrefills, observed: list[torch.Tensor], num_layers: int
    ) -> torch.Tensor:
        """Kept tokens of each head as the allocator means them, [N, L, Hkv]."""
        batch, num = prompts.batch, len(prompts.block_table)
        seen = None
        if observed:
            by_layer = torch.cat(observed) if len(observed) > 1 else observed[0]
            seen = by_layer.unflatten(0, (num_layers, num)).transpose(0, 1).contiguous()
        request = BudgetRequest(
            batch.prompt_lens,
            batch.num_candidates,
            batch.capacity,
            batch.num_protected,
            prompts.head_budgets,
        )
        kept = self.allocator.kept_tokens(seen, request)
        return kept.expand(num, num_layers, self.num_kv_heads)

    def _page_count(self, batch: PromptBatch, kept: torch.Tensor) -> torch.Tensor:
        """Pages of every head [N, L, Hkv], from kept tokens of the same shape.

        Heads that share their pages hold exactly the pages of the kept blocks: those of a layer, or
        those of all layers.
        """
        match self.allocator.scope:
            case Scope.UNIFORM:
                return batch.num_kept_blocks[:, None, None].expand_as(kept)
            case Scope.LAYER:
                by_layer = torch.stack(batch).repeat_interleave(kept.shape[1], dim=1)
                rows = PromptBatch(*by_layer.unbind())
                return self._rounded(rows, kept.flatten(0, 1)).view_as(kept)
        if self.allocator.per_layer:
            return self._rounded(batch, kept[:, :, 0])[:, :, None].expand_as(kept)
        return self._rounded(batch, kept.flatten(1)).view_as(kept)

    def _rounded(self, batch: PromptBatch, kept: torch.Tensor) -> torch.Tensor:
        """Pages of the entries [N, X] of a group that shares its pages."""
        return pages_from_kept(
            kept,
            batch.tail,
            batch.num_protected_in_blocks,
            batch.num_kept_blocks,
            batch.num_full_blocks,
            self.layout.block_size,
        )

    def _compact(
        self,
        prompts: FinishedPrefills,
        stack: LayerStack,
        groups: list[ScoredLayers],
        kept: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
    ) -> None:
        """Move the kept entries of consecutive groups, which have their pages to themselves.

        Args:
            kept, count, start: [N, L, Hkv] kept tokens, pages and number of the first page.
        """
        batch, num = prompts.batch, len(prompts.block_table)
        first, last = groups[0].first, groups[-1].last
        num_pages = prompts.pages_per_layer * (last - first)
        width = self.layout.block_size * 2 * self.layout.head_size
        # the last page takes what no head owns
        pages = stack.pages.new_empty((num * num_pages + 1, width))
        start = start - start[:, first : first + 1, :1]
        for group in groups:
            shares = [
                per_head[:, group.first : group.last].transpose(0, 1).flatten(0, 1)
                for per_head in (kept, count, start)
            ]
            self._stage(prompts, group, shares[0], shares[1], shares[2], pages)
        kernels.write_pages(
            PromptPages(
                stack.pages[first * stack.layer_pages :],
                prompts.block_table,
                self.num_kv_heads,
                self.layout,
            ),
            pages[:-1].view(num, num_pages, width),
            batch.num_kept_blocks * (self.num_kv_heads * (last - first)),
            batch.num_full_blocks,
            batch.num_kept_blocks,
            stack.layer_pages,
        )

    def _stage(
        self,
        prompts: FinishedPrefills,
        group: ScoredLayers,
        kept: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        """Copy what the heads of some layers keep to its place among the pages of its prompt.

        Args:
            kept, count, start: [R, Hkv].
            pages: [N * P + 1, block_size * 2 * D], P pages of each prompt.
        """
        batch, final, ctx = group.batch, group.final, group.ctx
        if self.scorer.recent_fraction:
            recent = (kept * self.scorer.recent_fraction).long().clamp_min(1)
            is_recent = ctx.positions >= batch.prompt_lens[:, None, None] - recent[:, :, None]
            final = final.masked_fill(is_recent, float("inf"))
        in_pages = batch.num_full_blocks * self.layout.block_size
        candidates = torch.minimum(in_pages, batch.prompt_lens - batch.num_recent)
        slots = count * self.layout.block_size
        max_slots = prompts.max_pages * self.layout.block_size
        if self.merge is None:
            chosen = self._select(group, final, slots, candidates, in_pages, max_slots)
            staged = pages[:-1].view(len(prompts.block_table), -1, pages.shape[1])
            kernels.stage_tokens(ctx.prompts, chosen, count, start, staged)
            return
        competes = ctx.positions < candidates[:, None]
        if prompts.visual is not None:
            competes = competes & prompts.visual.repeat(len(ctx.layers), 1)
        protected = ~competes[:, None] & (ctx.positions < in_pages[:, None])[:, None]
        merge_ctx = MergeContext(
            keys=ctx.keys,
            values=ctx.values,
            final=final.masked_fill(protected, float("inf")),
            competes=competes,
            prompt_lens=batch.prompt_lens,
            in_pages=in_pages,
            segment=ctx.segment,
            num_segments=prompts.num_segments,
            slots=slots,
        )
        tokens = self.merge.num_tokens(merge_ctx)
        merge_ctx.kept = self._select(group, final, tokens, candidates, in_pages, max_slots)
        entries = kernels.as_stored(ctx.prompts, *self.merge.merge(merge_ctx))
        ctx.release()
        self._place(entries, count, start, pages, len(prompts.block_table))

    def _select(
        self,
        group: ScoredLayers,
        final: torch.Tensor,
        tokens: torch.Tensor,
        candidates: torch.Tensor,
        in_pages: torch.Tensor,
        max_slots: int,
    ) -> torch.Tensor:
        """What heads keep in their pages, see ``kernels.select_tokens``."""
        return kernels.select_tokens(final, tokens, candidates, in_pages, max_slots)

    def _place(
        self,
        entries: torch.Tensor,
        count: torch.Tensor,
        start: torch.Tensor,
        pages: torch.Tensor,
        num: int,
    ) -> None:
        """Put entries [R, Hkv, K, 2 * D] where ``stage_tokens`` would put tokens."""
        rows = entries.view(*count.shape, -1, pages.shape[1])
        index = torch.arange(rows.shape[2], device=rows.device)
        nowhere = len(pages) - 1
        prompt = torch.arange(len(rows), device=rows.device)[:, None, None] % num
        target = prompt * (nowhere // num) + start[..., None] + index
        target = target.masked_fill(index >= count[..., None], nowhere)
        kernels.as_bytes(pages)[target] = kernels.as_bytes(rows)
