# SPDX-License-Identifier: Apache-2.0
"""How one prompt is compressed: what each head looks at, how it scores, what it keeps.

For explanations only: a recording holds maps of all layers and computes the window's attention a
second time, beyond the bound on the memory of a compression.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference
from vllm_kvcompress.pipeline import CompressionPipeline
from vllm_kvcompress.pipeline_inputs import FinishedPrefills, LayerStack, ScoredLayers
from vllm_kvcompress.scoring import Need, Scores, ScoringContext
from vllm_kvcompress.scoring.bacon import Bacon
from vllm_kvcompress.scoring.snapkv import SnapKV


class WindowMaps(NamedTuple):
    """What the window tells, and what BACON reads from it. All [L, Hkv, T] float32.

    Where the method is ``bacon``, its own options hold, and what it adds to the score follows from
    these maps. Elsewhere they are its defaults, and the maps show what it would see.

    Attributes:
        window, last: attention of the window's rows, mean, and of the last one; not pooled.
        evidence: E, what the last row sees more of, both pooled.
        coherence: how much evidence lies around each token.
        persistence: what earlier layers agree on.
    """

    window: torch.Tensor
    last: torch.Tensor
    evidence: torch.Tensor
    coherence: torch.Tensor
    persistence: torch.Tensor


class PromptRecord(NamedTuple):
    """One compression of one prompt.

    Attributes:
        kept: [L, Hkv, T] bool, the tokens that each head attends to from now on. With a merge,
            those that others were merged into.
        final: [L, Hkv, T] float32, the score that ranks tokens inside a head: -inf where nothing
            competes, inf at text that stays.
        maps: None for methods that do not look at the window.
    """

    kept: torch.Tensor
    final: torch.Tensor
    maps: WindowMaps | None


class _Seen(NamedTuple):
    """Window, last row, B, E, and what later layers see of it, [R, Hkv, T] of some layers.

    Attributes:
        columns: images that are pooled along their columns there.
    """

    window: torch.Tensor
    last: torch.Tensor
    base: torch.Tensor
    evidence: torch.Tensor
    left: torch.Tensor
    columns: kernels.Grids | None


class RecordingPipeline(CompressionPipeline):
    """Compresses a single prompt and remembers how.

    Its arguments are those of ``CompressionPipeline``.
    """

    def record_one(
        self, prompts: FinishedPrefills, stack: LayerStack
    ) -> tuple[PromptRecord, torch.Tensor]:
        """Compress the only prompt of ``prompts``; also returns what ``compress`` does."""
        assert len(prompts.block_table) == 1, "one prompt at a time is recorded"
        self._kept: list[torch.Tensor] = []
        self._final: list[torch.Tensor] = []
        self._seen: list[_Seen] = []
        count = self.compress(prompts, stack)
        maps = self._window_maps(prompts) if self._seen else None
        return PromptRecord(torch.cat(self._kept), torch.cat(self._final), maps), count

    @property
    def _bacon(self) -> Bacon:
        """The method's own options as far as BACON has them."""
        if not isinstance(self.scorer, SnapKV):
            return Bacon()
        names = {field.name for field in dataclasses.fields(Bacon)}
        own = dataclasses.asdict(self.scorer)
        return Bacon(**{name: own[name] for name in names & own.keys()})

    def _score(
        self, prompts: FinishedPrefills, stack: LayerStack, layers_together: int
    ) -> Iterator[tuple[ScoredLayers, Scores]]:
        for group, scores in super()._score(prompts, stack, layers_together):
            self._final.append(group.final)
            if Need.WINDOW_QUERIES in self.scorer.needs:
                self._seen.append(self._look(group.ctx))
            yield group, scores

    def _select(
        self,
        group: ScoredLayers,
        final: torch.Tensor,
        tokens: torch.Tensor,
        candidates: torch.Tensor,
        in_pages: torch.Tensor,
        max_slots: int,
    ) -> torch.Tensor:
        chosen = super()._select(group, final, tokens, candidates, in_pages, max_slots)
        positions, length = group.ctx.positions, final.shape[2]
        tail = (positions >= in_pages[:, None]) & group.ctx.is_prompt
        kept = final.new_zeros((*final.shape[:2], length + 1), dtype=torch.bool)
        kept.scatter_(2, chosen, True)  # what a head has no room for is at T
        self._kept.append(kept[:, :, :length] | tail[:, None])
        return chosen

    def _look(self, ctx: ScoringContext) -> "_Seen":
        bacon = self._bacon
        window, last = bacon.window_scores(ctx)
        base, evidence, columns = bacon.boundary(ctx, window, last)
        return _Seen(window, last, base, evidence, bacon.left_behind(ctx, evidence), columns)

    def _window_maps(self, prompts: FinishedPrefills) -> WindowMaps:
        bacon = self._bacon
        window, last, base, evidence, left = (
            torch.cat(layers) for layers in zip(*(seen[:-1] for seen in self._seen), strict=True)
        )
        columns = [seen.columns for seen in self._seen if seen.columns is not None]
        grids = None
        if columns:
            grids = kernels.Grids(*(torch.cat(parts) for parts in zip(*columns, strict=True)))
        num_candidates = (prompts.batch.prompt_lens - self.window).expand(len(base))
        coherence = reference.bacon_coherence(
            base.masked_fill(base.isneginf(), 0.0),
            evidence,
            num_candidates,
            bacon.mode,
            bacon.local_k,
            grids,
        )
        persistence = reference.bacon_persistence(
            left[:, None], len(left), bacon.trace_r, bacon.mode
        )
        found = (window, last, evidence, coherence, persistence)
        return WindowMaps(*(self.mean_over_replicas(each) for each in found))
