# SPDX-License-Identifier: Apache-2.0
"""Every merge: new keys and values for entries of one KV head, from the tokens it drops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from oracle.scorers import unit


class Entries(NamedTuple):
    """Entries of one head that differ from the uncompressed cache."""

    positions: np.ndarray  # [M] whose slots hold them
    keys: np.ndarray  # [M, D]
    values: np.ndarray  # [M, D]


class Bin(NamedTuple):
    """Dropped tokens that share one entry."""

    members: np.ndarray  # positions, ascending
    weights: np.ndarray  # sum 1


def lookm(
    keys: np.ndarray,  # [P, D]
    values: np.ndarray,
    targets: np.ndarray,  # kept positions, ascending
    sources: np.ndarray,  # dropped positions
    mode: str,  # avg | pivot | weighted
) -> Entries:
    """Each dropped token joins the kept one whose key points most nearly its way."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    cosines = unit(keys[sources]) @ unit(keys[targets]).T
    nearest = cosines.argmax(axis=1) if len(sources) else np.zeros(0, dtype=np.int64)
    merged = []
    for x in (keys, values):
        out = x[targets].copy()
        for index, target in enumerate(targets):
            mine = nearest == index
            joined = x[sources[mine]]
            if mode == "pivot":
                joined = (joined + x[target]) / 2
            elif mode == "weighted":
                joined = joined * cosines[mine, index][:, None]
            out[index] = np.concatenate([x[target][None], joined]).mean(axis=0)
        merged.append(out)
    return Entries(targets, *merged)


def elastic(
    keys: np.ndarray, values: np.ndarray, anchors: np.ndarray, sources: np.ndarray
) -> Entries:
    """Each dropped token joins the nearest anchor, the lower one of two; plain means."""
    keys, values = keys.astype(np.float64), values.astype(np.float64)
    if len(anchors) == 0:
        return Entries(anchors, keys[anchors], values[anchors])
    nearest = np.abs(sources[:, None] - anchors[None, :]).argmin(axis=1)
    groups = [np.append(sources[nearest == i], anchor) for i, anchor in enumerate(anchors)]
    means = ([x[group].mean(axis=0) for group in groups] for x in (keys, values))
    return Entries(anchors, *(np.stack(mean) for mean in means))


def recycle(
    order: np.ndarray,  # positions of the full blocks, pinned ones first, then best first
    pinned: int,
    room: int,  # entries that the head's pages hold
    score: np.ndarray,  # [n] final
    segments: Sequence[np.ndarray],  # [M] candidates of each segment in the full blocks, ascending
    per_segment: int,
) -> tuple[int, list[Bin]]:
    """How many tokens of `order` stay, and the bins that fill the rest of the pages."""

    def members(count: int) -> list[np.ndarray]:
        dropped = [np.setdiff1d(segment, order[:count]) for segment in segments]
        bins = [np.array_split(d, min(per_segment, len(d))) for d in dropped if len(d)]
        return [part for parts in bins for part in parts]

    if room - pinned <= len(members(0)):
        # one bin for all segments together, if a token besides it has room
        segments, per_segment = [np.concatenate([*segments, np.zeros(0, dtype=np.int64)])], 1
        if room - pinned < 2:
            return room, []
    count = next(c for c in range(room + 1) if c + len(members(c)) >= room)
    bins = []
    for part in members(count):
        weights = score[part]
        total = weights.sum()
        flat = np.full(len(part), 1 / len(part))
        bins.append(Bin(part, weights / total if total != 0 else flat))
    return count, bins


def bin_entries(keys: np.ndarray, values: np.ndarray, bins: Sequence[Bin]) -> Entries:
    """The bins of a head, each in the slot of its last member."""
    slots = np.array([part.members[-1] for part in bins], dtype=np.int64)
    sums = (
        np.array([part.weights @ x[part.members].astype(np.float64) for part in bins])
        for x in (keys, values)
    )
    return Entries(slots, *(total.reshape(len(bins), keys.shape[-1]) for total in sums))
