# SPDX-License-Identifier: Apache-2.0
"""Inputs for scorers that are made from whole prompts, slowly and in float64."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_kvcompress.kernels import PageLayout, PromptPages
from vllm_kvcompress.scoring import LayerTrace, ScoringContext
from vllm_kvcompress.scoring.base import ROWS, HiddenMoments, QueryMoments, Scorer


def dense_prompts(keys: torch.Tensor, values: torch.Tensor) -> PromptPages:
    """Pages of one block per request for keys and values [N, Hkv, T, D]."""
    num, num_heads, length, head_size = keys.shape
    pages = torch.cat([keys, values], dim=-1).reshape(num * num_heads, length * 2 * head_size)
    table = torch.arange(num)[:, None]
    return PromptPages(pages, table, num_heads, PageLayout(length, head_size))


def attention(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """Causal probabilities [Hq, T, T] of q [Hq, T, D] on k [Hkv, T, D]."""
    keys = np.repeat(k.astype(np.float64), len(q) // len(k), axis=0)
    logits = q.astype(np.float64) @ keys.swapaxes(1, 2) * scale
    logits[:, np.triu(np.ones(logits.shape[1:], bool), 1)] = -np.inf
    logits -= logits.max(-1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def group_mean(values: np.ndarray, num_kv_heads: int) -> np.ndarray:
    return values.reshape(num_kv_heads, -1, *values.shape[1:]).mean(1)


def key_attention_sum(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """[Hkv, T]."""
    return group_mean(attention(q, k, scale).sum(1), len(k))


def rotation(position: int, head_size: int) -> np.ndarray:
    """RoPE matrix [D, D], half-split layout, theta 1e4."""
    half = head_size // 2
    angles = position * 1e4 ** (-np.arange(half) / half)
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


@dataclass
class Maker:
    """Queries of N prompts from hidden states, by a weight [d, Hq, D] and RoPE.

    Attributes:
        last: position of each prompt's last token.
        shared: whether it says that all layers rotate alike, which they do.
    """

    weight: np.ndarray
    last: list[int]
    shared: bool = True

    def project(self, layers: range, hidden: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        weight = torch.from_numpy(self.weight).float()
        return self.rotate(layers, torch.einsum("nmx,xhd->nmhd", hidden, weight), offsets)

    def rotate(self, layers: range, queries: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        size = queries.shape[-1]
        of_each = [[rotation(last + i, size) for i in offsets.tolist()] for last in self.last]
        turns = torch.from_numpy(np.array(of_each)).float().repeat(len(layers), 1, 1, 1)
        return torch.einsum("nmde,nmhe->nmhd", turns, queries)

    def shares_rotation(self, layers: range) -> bool:
        return self.shared

    def of_prompts(self, prompts: slice) -> "Maker":
        return dataclasses.replace(self, last=self.last[prompts])


@dataclass
class Prompt:
    """Everything that a model would show of a prompt, by layer.

    Attributes:
        q, raw: [L, Hq, P, D] queries with and without RoPE.
        k, v: [L, Hkv, P, D].
        hidden: [L, P, d] inputs of the attention layers.
        segment: [P], index of the image of a visual token, else -1.
    """

    q: np.ndarray
    raw: np.ndarray
    k: np.ndarray
    v: np.ndarray
    hidden: np.ndarray
    segment: np.ndarray

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @property
    def instruction_len(self) -> int:
        """Rows of the instruction."""
        visual = np.flatnonzero(self.segment >= 0)
        return max(1, self.length - 1 - visual[-1]) if len(visual) else 8


def random_prompt(
    seed: int,
    length: int,
    images: tuple[tuple[int, int], ...] = (),
    num_q=4,
    num_kv=2,
    size=8,
    layers=2,
) -> Prompt:
    """Hidden states have 6 features. ``images`` are [start, end)."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=(layers, *shape)).astype(np.float32) * 1.5

    segment = np.full(length, -1)
    for index, (start, end) in enumerate(images):
        segment[start:end] = index
    raw = draw(num_q, length, size)
    turns = np.array([rotation(i, size) for i in range(length)], dtype=np.float32)
    return Prompt(
        q=np.einsum("tde,lhte->lhtd", turns, raw),
        raw=raw,
        k=draw(num_kv, length, size),
        v=draw(num_kv, length, size),
        hidden=draw(length, 6),
        segment=segment,
    )


def context(
    prompts: list[Prompt],
    layer: int,
    scorer: Scorer,
    trace: LayerTrace,
    window: int = 8,
    capacity: int = 4,
    garbage: float = float("nan"),
) -> ScoringContext:
    """One layer of several requests, with ``garbage`` wherever a scorer must not look."""
    num, longest = len(prompts), max(p.length for p in prompts)
    num_q, num_kv, size = prompts[0].q.shape[1], *prompts[0].k.shape[1::2]
    num_rows = max(window, *(p.instruction_len for p in prompts))
    keys, values = torch.full((2, num, num_kv, longest, size), garbage)
    sums = torch.full((num, num_kv, longest), garbage)
    queries = torch.full((num, num_rows, num_q, size), garbage)
    segment = torch.zeros(num, longest, dtype=torch.int64)
    most = max(1, *(int(p.segment.max()) + 1 for p in prompts))
    for i, p in enumerate(prompts):
        keys[i, :, : p.length] = torch.from_numpy(p.k[layer])
        values[i, :, : p.length] = torch.from_numpy(p.v[layer])
        collected = key_attention_sum(p.q[layer], p.k[layer], size**-0.5)
        sums[i, :, : p.length] = torch.from_numpy(collected)
        rows = max(window, p.instruction_len)
        queries[i, -rows:] = torch.from_numpy(p.q[layer][:, -rows:]).transpose(0, 1)
        segment[i, : p.length] = torch.from_numpy(p.segment)
    return ScoringContext(
        layers=(layer,),
        stack=range(layer, layer + 1),
        prompt_lens=torch.tensor([p.length for p in prompts]),
        capacity=torch.full((num,), capacity),
        window=window,
        queries=queries,
        prompts=dense_prompts(keys, values),
        scale=torch.full((num,), size**-0.5),
        num_recent=torch.full((num,), max(1, scorer.num_recent(window, 12))),
        instruction_len=torch.tensor([p.instruction_len for p in prompts]),
        segment=segment,
        num_segments=max(int(p.segment.max()) + 1 for p in prompts),
        grids=torch.stack([grid_lines(p, most) for p in prompts]),
        output_grams=output_grams(num_q, size)[layer : layer + 1],
        trace=trace,
        key_attention_sum=sums,
        hidden=stack([hidden_moments(p.hidden[layer], scorer) for p in prompts]),
        moments=stack([query_moments(p.raw[layer], scorer) for p in prompts]),
        projector=maker_of(prompts),
    )


def together(contexts: list[ScoringContext]) -> ScoringContext:
    """One context of the layers of several, which have the same prompts."""
    first, blocks, tables = contexts[0], 0, []
    for ctx in contexts:
        tables.append(ctx.prompts.block_table + blocks)
        blocks += len(ctx.prompts.pages) // ctx.prompts.num_kv_heads
    merged: dict[str, Any] = {}
    for name in ROWS:
        parts = [getattr(ctx, name) for ctx in contexts]
        if isinstance(parts[0], torch.Tensor):
            merged[name] = torch.cat(parts)
        elif name != "prompts" and parts[0] is not None:
            merged[name] = type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))
    grams = [ctx.output_grams for ctx in contexts if ctx.output_grams is not None]
    merged["output_grams"] = torch.cat(grams)
    merged["prompts"] = first.prompts._replace(
        pages=torch.cat([ctx.prompts.pages for ctx in contexts]), block_table=torch.cat(tables)
    )
    layers = tuple(layer for ctx in contexts for layer in ctx.layers)
    stack = range(contexts[0].stack.start, contexts[-1].stack.stop)
    return dataclasses.replace(first, layers=layers, stack=stack, trace=LayerTrace(), **merged)


def grid_lines(prompt: Prompt, most: int) -> torch.Tensor:
    """[most, 4], see ``Grids``: images as high as wide, as nearly as their tokens can be."""
    lines = torch.zeros(most, 4, dtype=torch.int64)
    for index in range(int(prompt.segment.max()) + 1):
        places = np.flatnonzero(prompt.segment == index)
        count = len(places)
        width = max(w for w in range(1, count + 1) if count % w == 0 and w * w <= count)
        lines[index] = torch.tensor([places[0], places[-1] + 1, width, width])
    return lines


def output_projections(num_q: int, size: int, layers: int = 8) -> np.ndarray:
    """[L, Hq, D, d], no two heads alike."""
    shape = (layers, num_q, size, 6)
    return np.random.default_rng(98).normal(size=shape).astype(np.float32)


def output_grams(num_q: int, size: int) -> torch.Tensor:
    """[L, Hq, D, D]."""
    weights = torch.from_numpy(output_projections(num_q, size))
    return weights @ weights.mT


def maker_of(prompts: list[Prompt]) -> Maker:
    """The same projection in every layer."""
    num_q, size = prompts[0].q.shape[1], prompts[0].q.shape[3]
    weight = np.random.default_rng(99).normal(size=(6, num_q, size))
    return Maker(weight, [p.length - 1 for p in prompts])


def hidden_moments(hidden: np.ndarray, scorer: Scorer) -> HiddenMoments:
    """Of [P, d], without the dimension N."""
    x = torch.from_numpy(hidden[scorer.stats_from(len(hidden)) :])
    return HiddenMoments(torch.tensor(len(x)), x.sum(0), x.square().sum(0), x[-1])


def query_moments(queries: np.ndarray, scorer: Scorer) -> QueryMoments:
    """Of [Hq, P, D], without the dimension N."""
    q = torch.from_numpy(queries[:, scorer.stats_from(queries.shape[1]) :]).float()
    return QueryMoments(torch.tensor(q.shape[1]), q.sum(1), q.mT @ q)


def stack(rows):
    """One record of tensors [N, ...] from N of them."""
    return type(rows[0])(*map(torch.stack, zip(*rows, strict=True)))
