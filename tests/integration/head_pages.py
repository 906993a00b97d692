# SPDX-License-Identifier: Apache-2.0
"""Reading head pages out of a worker's KV tensors, and finding out which tokens they hold."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from engine import Stepper, compressed_layers, compressed_manager

from vllm_kvcompress.adapter.cache_types import FLOAT8_TYPES
from vllm_kvcompress.page_state import PageTables


@dataclass(frozen=True)
class HeldPages:
    """What one request holds in the cache right now, read through its head pages.

    Attributes:
        keys, values: [L][Hkv] arrays [kv_len, D] in page order.
        page_ids: [L][Hkv] the pages that hold them, numbered over all layers.
        num_computed: logical length.
    """

    keys: list[list[np.ndarray]]
    values: list[list[np.ndarray]]
    page_ids: list[list[list[int]]]
    num_computed: int


def held_pages(stepper: Stepper, name: str) -> HeldPages:
    """Read the head pages of a running request out of the worker's KV tensors.

    Blocks are those that the scheduler knows of: both model runners follow it.
    """
    llm = stepper.llm
    layers = compressed_layers(llm)
    req_id = stepper.internal[name]
    (slot,) = layers.state_slots([req_id])
    request = stepper.request(name)
    length = request.num_computed_tokens - request.num_in_flight_tokens
    width = -(-length // layers.block_size)
    device = layers.facts.device
    held_blocks = compressed_manager(llm).req_to_blocks[req_id]
    table = torch.tensor([[b.block_id for b in held_blocks][:width]], dtype=torch.int32)
    table = table.to(device)
    layout, size, num_heads = layers.facts.layout, layers.block_size, layers.num_kv_heads
    all_pages, layer_pages = layers.facts.pages
    held = HeldPages([], [], [], length)
    for layer_idx, layer in enumerate(layers.facts.modules):
        float8 = FLOAT8_TYPES.get(layer.kv_cache_dtype)
        # ids of uniform budgets count from the layer's own pages
        first = layer_idx * layer_pages if layers.uniform else 0
        (tables,), (kv_len,) = PageTables(layers.state, width, size).fill(
            torch.tensor([slot], device=device),
            table,
            torch.tensor([length], dtype=torch.int32, device=device),
            0 if layers.uniform else layer_idx,
            1,
            0 if layers.uniform else layer_pages,
        )
        for per_head in (held.keys, held.values, held.page_ids):
            per_head.append([])
        for head in range(num_heads):
            count = int(kv_len[head])
            used = tables[head, : -(-count // size)].long()
            rows = all_pages[used + first]
            rows = rows.float() if float8 is None else rows.view(float8).float()
            for part, index, scale, per_head in (
                (0, layout.key_index, layer._k_scale_float, held.keys),
                (1, layout.value_index, layer._v_scale_float, held.values),
            ):
                found = (
                    rows[:, index]
                    if index is not None
                    else rows.unflatten(1, (size, 2, -1))[:, :, part].flatten(1)
                )
                found = found.reshape(-1, layout.head_size)[:count]
                per_head[-1].append((found * scale).cpu().numpy())
            held.page_ids[-1].append((used + first).tolist())
    return held


SAME_KEY = 1e-3
"""Distance, relative to the largest key, that noise is far below and other keys are far above."""


def positions_of(held: HeldPages, reference: np.ndarray) -> list[list[np.ndarray]]:
    """Prompt positions that each head holds, in page order, found by matching keys.

    Args:
        held: of a request.
        reference: [L, Hkv, P, D] keys of the whole prompt after RoPE, from the oracle.

    Returns:
        [L][Hkv] positions; what lies behind the prompt (decode tokens) is left out.
    """
    decoded = held.num_computed - reference.shape[2]
    result: list[list[np.ndarray]] = []
    for layer, heads in enumerate(held.keys):
        result.append([])
        for head, rows in enumerate(heads):
            rows = rows[: len(rows) - decoded]
            distance = np.abs(rows[:, None] - reference[layer, head][None]).max(axis=2)
            nearest = distance.argmin(axis=1)
            worst = distance.min(axis=1).max() / np.abs(reference[layer, head]).max()
            assert worst < SAME_KEY, f"layer {layer} head {head}: a page holds no prompt key"
            result[-1].append(nearest)
    return result


def assert_kept(
    held: HeldPages, reference: np.ndarray, kept: Iterable[Iterable[np.ndarray]]
) -> None:
    """The pages hold exactly the given positions, ascending, and no page has two owners."""
    for layer, (got, expected) in enumerate(zip(positions_of(held, reference), kept, strict=True)):
        for head, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.tolist() == list(b), f"layer {layer} head {head} keeps other positions"
    assert_unshared(held)


def assert_unshared(held: HeldPages) -> None:
    """No page has two owners."""
    every = [page for heads in held.page_ids for ids in heads for page in ids]
    assert len(every) == len(set(every))
