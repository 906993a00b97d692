# SPDX-License-Identifier: Apache-2.0
"""From scores and budgets to pages, kept sets and merged entries of one prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from oracle import merges
from oracle.allocators import (
    PER_LAYER,
    STATIC,
    HeadTokens,
    apportion,
    head_tokens,
    layer_capacities,
    static_tokens,
)
from oracle.config import Budget, OracleConfig, budget_of
from oracle.prompt import Prompt, visual_mask
from oracle.scorers import Scored, score_layers

KeptSets = list[list[np.ndarray]]  # [L][Hkv] ascending prompt positions, int64


class PagePlan(NamedTuple):
    """How a prompt of P tokens splits into pages; `uniform` is n, what heads have on average."""

    full: int  # m
    tail: int
    uniform: int
    compressed: bool
    fixed: int  # tokens of the full blocks that are always kept


class Selection(NamedTuple):
    """What each KV head keeps of a prompt."""

    kept: KeptSets
    plan: PagePlan
    pages: list[list[int]]  # [L][Hkv]; m each if nothing is compressed
    bins: list[list[list[merges.Bin]]]  # [L][Hkv][entries] of merge recycle


def page_plan(
    length: int,
    cfg: OracleConfig,
    layers: int = 1,
    num_kv: int = 1,
    segments: Sequence[tuple[int, int]] = (),
) -> PagePlan:
    """Pages of an average head; nothing is dropped unless that is fewer than the full blocks."""
    full, tail = divmod(length, cfg.block_size)
    budget = budget_of(visual_mask(length, segments), cfg)
    blocks_end = length - tail
    if cfg.visual:
        fixed = blocks_end - int(budget.candidates[:blocks_end].sum())
    else:
        fixed = max(0, budget.recent - tail)
    mean = Fraction(budget.kept)
    if cfg.allocator in STATIC:
        tokens = static_tokens(layers, num_kv, budget, cfg)
        mean = Fraction(sum(map(sum, tokens)), layers * num_kv)
    uniform = max(
        1,
        math.ceil((mean - tail) / cfg.block_size),
        math.ceil(Fraction(fixed, cfg.block_size)),
    )
    compressed = full - uniform >= cfg.pool_block and bool(budget.candidates.any())
    return PagePlan(full, tail, uniform, compressed, fixed)


def head_pages(tokens: HeadTokens, plan: PagePlan, cfg: OracleConfig) -> list[list[int]]:
    """Pages [L][Hkv] for K[l, g]; whatever the allocator, n per head on average."""
    layers, num_kv = len(tokens), len(tokens[0])
    least = math.ceil(Fraction(plan.fixed, cfg.block_size))

    def share_out(counts: Sequence[int]) -> list[int]:
        wanted = [Fraction(count - plan.tail, cfg.block_size) for count in counts]
        return apportion(wanted, plan.uniform * len(counts), least, plan.full)

    if cfg.allocator in PER_LAYER:
        return [[pages] * num_kv for pages in share_out([heads[0] for heads in tokens])]
    if cfg.allocator == "adakv":
        return [share_out(heads) for heads in tokens]
    flat = share_out([count for heads in tokens for count in heads])
    return [flat[layer * num_kv : (layer + 1) * num_kv] for layer in range(layers)]


def recent_of_head(kept: int, budget: Budget, cfg: OracleConfig) -> int:
    """R of one head; postvision's is a tenth of what the head keeps."""
    if cfg.root.scorer == "postvision":
        return max(1, kept // 10)
    return budget.recent


def keep_everything(prompt: Prompt, plan: PagePlan) -> Selection:
    """The selection of a prompt that is not compressed."""
    layers, heads = range(prompt.num_layers), range(prompt.num_kv)
    return Selection(
        kept=[[np.arange(prompt.length) for _ in heads] for _ in layers],
        plan=plan,
        pages=[[plan.full for _ in heads] for _ in layers],
        bins=[[[] for _ in heads] for _ in layers],
    )


def select(prompt: Prompt, cfg: OracleConfig) -> Selection:
    """What every KV head of every layer keeps, bins included, values not yet merged."""
    layers, num_kv, length = prompt.num_layers, prompt.num_kv, prompt.length
    plan = page_plan(length, cfg, layers, num_kv, prompt.segments)
    if not plan.compressed:
        return keep_everything(prompt, plan)
    budget = budget_of(prompt.visual, cfg)
    scored = score_layers(prompt, cfg, budget.recent, layer_capacities(layers, budget, cfg))
    tokens = head_tokens(prompt, budget, scored, cfg)
    pages = head_pages(tokens, plan, cfg)

    kept: KeptSets = [[] for _ in range(layers)]
    bins: list[list[list[merges.Bin]]] = [[] for _ in range(layers)]
    for layer in range(layers):
        for head in range(num_kv):
            recent = recent_of_head(tokens[layer][head], budget, cfg)
            competing = budget.candidates & (np.arange(length) < length - recent)
            room = pages[layer][head] * cfg.block_size
            chosen, filled = choose(
                scored[layer], head, competing, room, length - plan.tail, prompt.segments, cfg
            )
            tail = np.arange(length - plan.tail, length)
            kept[layer].append(np.concatenate([np.sort(chosen), tail]))
            bins[layer].append(filled)
    return Selection(kept, plan, pages, bins)


def choose(
    scored: Scored,
    head: int,
    competing: np.ndarray,  # [P] bool
    room: int,
    blocks_end: int,
    segments: Sequence[tuple[int, int]],
    cfg: OracleConfig,
) -> tuple[np.ndarray, list[merges.Bin]]:
    """Positions in the full blocks that one head keeps, and its bins."""
    pinned = np.flatnonzero(~competing[:blocks_end])
    ranked = np.flatnonzero(competing[:blocks_end])
    score = scored.final[head]
    ranked = ranked[np.argsort(-score[ranked], kind="stable")]
    order = np.concatenate([pinned, ranked])
    if cfg.merge != "recycle":
        return order[:room], []
    members = [
        start + np.flatnonzero(competing[start : min(end, blocks_end)]) for start, end in segments
    ]
    count, bins = merges.recycle(order, len(pinned), room, score, members, cfg.bins)
    return order[:count], bins


def kept_sets(
    q: np.ndarray, k: np.ndarray, cfg: OracleConfig, scale: float, **inputs: object
) -> KeptSets:
    """Prompt positions that every KV head keeps.

    q [L, Hq, P, D], k [L, Hkv, P, D]; `inputs`: what else a `Prompt` has.
    """
    return select(Prompt(q, k, scale, **inputs), cfg).kept


def merged_entries(
    prompt: Prompt, selection: Selection, cfg: OracleConfig
) -> list[list[merges.Entries]]:
    """Entries [L][Hkv] whose keys and values compression has changed."""
    if cfg.merge == "none" or not selection.plan.compressed:
        return []
    blocks_end = prompt.length - selection.plan.tail
    return [
        [
            _merge_head(prompt, selection, cfg, layer, head, blocks_end)
            for head in range(prompt.num_kv)
        ]
        for layer in range(prompt.num_layers)
    ]


def _merge_head(
    prompt: Prompt,
    selection: Selection,
    cfg: OracleConfig,
    layer: int,
    head: int,
    blocks_end: int,
) -> merges.Entries:
    keys, values = prompt.k[layer, head], prompt.v[layer, head]
    if cfg.merge == "recycle":
        return merges.bin_entries(keys, values, selection.bins[layer][head])
    kept = selection.kept[layer][head]
    targets = kept[kept < blocks_end]
    sources = np.setdiff1d(np.arange(blocks_end), targets)
    if cfg.merge == "lookm":
        return merges.lookm(keys, values, targets, sources, cfg.merge_mode)
    anchors = targets[(targets >= cfg.root.num_sinks) & (targets != prompt.length - 1)]
    return merges.elastic(keys, values, anchors, sources)
