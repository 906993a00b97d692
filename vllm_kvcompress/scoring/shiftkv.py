# SPDX-License-Identifier: Apache-2.0
"""Votes of synthetic decode queries."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_kvcompress import kernels
from vllm_kvcompress.options import require_bool, require_choice, require_range, require_whole
from vllm_kvcompress.scoring.base import Need, Scorer, Scores, ScoringContext
from vllm_kvcompress.scoring.proxies import mean_and_deviation, standard_normal
from vllm_kvcompress.scoring.snapkv import SnapKV
from vllm_kvcompress.workspace import RowShape

_PRESETS: dict[str, dict[str, Any]] = {
    "released": {"stats": "scalar", "cover": "floor", "mix_last": True},
    "paper": {"stats": "feature", "cover": "min", "mix_last": False},
}


@dataclass(frozen=True)
class ShiftKV(Scorer):
    """How many groups of decode-like queries need a token to cover what they look at.

    Proxies are drawn around the mean hidden state with inflated spread, projected by the model and
    rotated to positions after the prompt. Each group of them votes for the tokens that cover tau of
    its attention; the last prompt query breaks ties.
    Source: MM-ShiftKV, arXiv 2607.22586 and its released code.

    Adaptation notes: noise depends on seed and layer only, on every rank and for every request; 32
    groups for every model (the released LLaVA path has 16); budgets are counted on snapkv's score;
    sums that decide what a cover holds are exact.

    Options:
        preset: "released" or "paper"; sets stats, cover and mix_last where they are not given.
        proxies, groups, gamma: N proxies in NG groups of N / NG, and the inflation of their spread.
        tau, vote_lambda: share of a group's attention that its votes cover, and the weight of the
            last query's attention against one vote.
        stats: mean and deviation over tokens and features ("scalar") or per feature ("feature").
        cover: largest set of at most tau ("floor", may be empty), smallest of at least tau ("min").
        mix_last: let the last query join every group, and leave the last token out of the cover.
        stat_ctx: statistics over that many last tokens; 0: all.
        llava_compat: in layers 0 and 1 one group of 16 copies of the last hidden state.
        seed: of the noise.
    """

    name: ClassVar[str] = "shiftkv"
    source: ClassVar[str] = "MM-ShiftKV, arXiv 2607.22586"
    cost: ClassVar[str] = "as snapkv, 2*L*N*Hq*D*(d + P), L*Hkv*NG covers; N proxies, NG groups"
    needs: ClassVar[Need] = SnapKV.needs | Need.LAST_QUERY | Need.HIDDEN_MOMENTS
    never_negative: ClassVar[bool] = True

    preset: str = "released"
    proxies: int = 512
    groups: int = 32
    gamma: float = 10.0
    tau: float = 0.95
    vote_lambda: float = 1.0
    stats: str | None = None
    cover: str | None = None
    mix_last: bool | None = None
    stat_ctx: int = 0
    llava_compat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, tuple(_PRESETS))
        for name, low in (("groups", 1), ("proxies", 1), ("stat_ctx", 0), ("seed", 0)):
            require_whole(name, getattr(self, name), low)
        if self.proxies % self.groups:
            raise ValueError(f"proxies must be a multiple of groups, got {self.proxies}")
        for name, high in (("gamma", 1e6), ("tau", 1), ("vote_lambda", 1e6)):
            require_range(name, getattr(self, name), 0, high)
        require_choice("stats", self._rule("stats"), ("scalar", "feature"))
        require_choice("cover", self._rule("cover"), ("floor", "min"))
        require_bool("mix_last", self._rule("mix_last"))
        require_bool("llava_compat", self.llava_compat)

    def _rule(self, name: str) -> Any:
        """An option that the preset sets where it was not given."""
        given = getattr(self, name)
        return _PRESETS[self.preset][name] if given is None else given

    def num_recent(self, window: int, kept: int) -> int:
        return 1

    @property
    def lookahead(self) -> int:
        return self.proxies

    def stats_from(self, prompt_len: int) -> int:
        return max(0, prompt_len - self.stat_ctx) if self.stat_ctx else 0

    def workspace(self, row: RowShape) -> int:
        hidden = 5 * self.proxies * row.hidden_size
        queries = 5 * self.proxies * row.num_q_heads * row.head_size
        return hidden + queries + (self.groups + 6) * row.scores

    def kept_for_good(self, hidden_size: int) -> int:
        return self.proxies * hidden_size  # noise

    def score(self, ctx: ScoringContext) -> Scores:
        num_first = sum(layer < 2 for layer in ctx.layers) if self.llava_compat else 0
        if 0 < num_first < len(ctx.layers):  # they have fewer proxies
            first = self.score(ctx.of_layers(0, num_first))
            others = self.score(ctx.of_layers(num_first, len(ctx.layers)))
            return Scores(*map(torch.cat, zip(first, others, strict=True)))
        assert ctx.projector is not None, "shiftkv needs the query projection"
        hidden, offsets, groups = self._proxies(ctx)
        where, numbers = (ctx.prompts, ctx.prompt_lens), (ctx.scale, ctx.softcap)
        # the model rotates in its own type: nothing is lost
        proxies = ctx.projector.project(ctx.stack, hidden, offsets).to(ctx.queries.dtype)
        masses = kernels.group_attention_sum(proxies, *where, groups, *numbers)
        own = kernels.group_attention_sum(ctx.queries[:, -1:], *where, 1, *numbers)
        end = ctx.prompt_lens - int(self._rule("mix_last"))
        if self._rule("mix_last"):
            masses += own
        votes = kernels.cover_votes(masses, end, self.tau, self._rule("cover"))
        return Scores(base=SnapKV().importance(ctx), final=votes + self.vote_lambda * own[:, :, 0])

    def _proxies(self, ctx: ScoringContext) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Hidden states [R, M, d], their offsets [M] after the prompt, and the number of groups."""
        assert ctx.hidden is not None, "shiftkv needs hidden states"
        hidden, device = ctx.hidden, ctx.hidden.last.device
        if self.llava_compat and ctx.layers[0] < 2:
            copies = hidden.last[:, None].expand(-1, 16, -1)
            return copies, torch.arange(1, 17, device=device), 1
        per_group = self.proxies // self.groups
        offsets = (torch.arange(self.proxies, device=device) % per_group + 1) * self.groups
        size = hidden.last.shape[1]
        noise = torch.stack(
            [standard_normal(self.seed, layer, self.proxies, size, device) for layer in ctx.layers]
        )[:, None]  # [L, 1, M, d]
        by_prompt = (len(ctx.layers), ctx.num_prompts, 1, -1)
        mean, deviation = (
            part.view(by_prompt)
            for part in mean_and_deviation(hidden, self._rule("stats") == "feature")
        )
        return (mean + self.gamma * deviation * noise).flatten(0, 1), offsets, self.groups
