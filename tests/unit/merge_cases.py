# SPDX-License-Identifier: Apache-2.0
"""Random prompts for merges, selected as a pipeline would, and what becomes of their entries."""

import dataclasses

import numpy as np
import torch
from hypothesis import strategies as st

from vllm_kvcompress.merging import MergeContext

HEAD_SIZE = 4


@dataclasses.dataclass
class Prompt:
    """One prompt of H heads; what is always kept has the score +inf."""

    keys: np.ndarray  # [H, P, D]
    values: np.ndarray  # [H, P, D]
    final: np.ndarray  # [H, P]
    competes: np.ndarray  # [P]
    in_pages: int
    segment: np.ndarray  # [P]
    slots: list[int]  # [H]

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def ranked(self, head: int) -> list[int]:
        """Positions below in_pages in the order in which the head keeps them."""
        return sorted(
            range(self.in_pages), key=lambda t: (self.competes[t], -self.final[head, t], t)
        )


def batch_of(prompts: list[Prompt], garbage: float = 0.0) -> MergeContext:
    """Scores and segments past a prompt's end are garbage, keys and values 0."""
    longest = max(prompt.length for prompt in prompts)

    def stack(name: str, axis: int, fill: float) -> torch.Tensor:
        parts = []
        for prompt in prompts:
            array = np.asarray(getattr(prompt, name))
            widths = [(0, 0)] * array.ndim
            widths[axis] = (0, longest - prompt.length)
            parts.append(torch.from_numpy(np.pad(array, widths, constant_values=fill)))
        return torch.stack(parts)

    return MergeContext(
        keys=stack("keys", 1, 0.0),
        values=stack("values", 1, 0.0),
        final=stack("final", 1, garbage),
        competes=stack("competes", 0, False),
        prompt_lens=torch.tensor([prompt.length for prompt in prompts]),
        in_pages=torch.tensor([prompt.in_pages for prompt in prompts]),
        segment=stack("segment", 0, -1),
        num_segments=max(1 + int(prompt.segment.max(initial=-1)) for prompt in prompts),
        slots=torch.tensor([prompt.slots for prompt in prompts]),
    )


def select(merge, prompts: list[Prompt], ctx: MergeContext, spare: int = 3) -> list[list[list]]:
    """Let every head keep its best tokens; unused entries stand at the end. [N][H] positions."""
    count = merge.num_tokens(ctx).tolist()
    width = max(max(prompt.slots) for prompt in prompts) + spare
    chosen = [
        [sorted(prompt.ranked(head)[:number]) for head, number in enumerate(row)]
        for prompt, row in zip(prompts, count, strict=True)
    ]
    length = ctx.keys.shape[2]
    rows = [[row + [length] * (width - len(row)) for row in heads] for heads in chosen]
    ctx.kept = torch.tensor(rows)
    return chosen


def merged(merge, prompts: list[Prompt], garbage: float = 0.0):
    """Kept positions [N][H] and entries [N][H] of (keys, values) as arrays of the used slots."""
    ctx = batch_of(prompts, garbage)
    kept = select(merge, prompts, ctx)
    keys, values = merge.merge(ctx)
    assert keys.shape == values.shape == (*ctx.kept.shape, keys.shape[3])
    entries = [
        [
            tuple(x[i, head, :slots].numpy() for x in (keys, values))
            for head, slots in enumerate(prompt.slots)
        ]
        for i, prompt in enumerate(prompts)
    ]
    return kept, entries


def plain(keys, values, slots, final=None, segment=None) -> Prompt:
    """One head, one full block, everything competes."""
    keys, values = (np.asarray(x, dtype=np.float32)[None] for x in (keys, values))
    length = keys.shape[1]
    final = np.zeros(length) if final is None else final
    segment = np.full(length, -1) if segment is None else segment
    return Prompt(
        keys,
        values,
        np.asarray(final, dtype=np.float32)[None],
        np.ones(length, dtype=bool),
        length,
        np.asarray(segment),
        [slots],
    )


@st.composite
def prompts(draw, num_heads=2, block=4):
    """Full blocks and a tail, images, some positions that are always kept, ties among scores."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    num_full = draw(st.integers(1, 6))
    in_pages = num_full * block
    length = in_pages + draw(st.integers(0, block - 1))
    segment = np.full(length, -1)
    start = draw(st.integers(0, 2))
    for index in range(draw(st.integers(0, 4))):
        end = min(start + draw(st.integers(1, 6)), length)
        segment[start:end] = index if end > start else -1
        start = end + draw(st.integers(0, 2))
    competes = np.arange(length) < in_pages - draw(st.integers(0, in_pages - 1))
    if draw(st.booleans()):
        competes &= segment >= 0
    pinned = in_pages - int(competes.sum())
    final = (rng.integers(0, 5, size=(num_heads, length)) / 4).astype(np.float32)
    final[:, ~competes] = np.inf
    slots = draw(st.lists(st.integers(pinned, in_pages), min_size=num_heads, max_size=num_heads))
    keys, values = (
        rng.normal(size=(num_heads, length, HEAD_SIZE)).astype(np.float32) for _ in range(2)
    )
    return Prompt(keys, values, final, competes, in_pages, segment, slots)
