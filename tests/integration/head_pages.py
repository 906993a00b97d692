# SPDX-License-Identifier: Apache-2.0
"""Reading head pages out of a worker's KV tensors, and finding out which tokens they hold."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from engine import Stepper, compressed_builder, model_runner, request_slots

from vllm_kvcompress.adapter.kv_cache import CompressedSpec


@dataclass(frozen=True)
class HeldPages:
    """What one request holds in the cache right now, read through its head pages.

    Attributes:
        keys: [L][Hkv] arrays [kv_len, D] in page order.
        page_ids: [L][Hkv] the pages that hold them.
        num_computed: logical length.
    """

    keys: list[list[np.ndarray]]
    page_ids: list[list[list[int]]]
    num_computed: int


def held_pages(stepper: Stepper, name: str) -> HeldPages:
    """Read the head pages of a running request out of the worker's KV tensors (runner V1)."""
    llm = stepper.llm
    runner, builder = model_runner(llm), compressed_builder(llm)
    req_id = stepper.internal[name]
    row = runner.input_batch.req_id_to_index[req_id]
    slot = request_slots(llm)._slot_of[req_id]
    group = next(
        index
        for index, groups in enumerate(runner.attn_groups)
        if any(isinstance(g.kv_cache_spec, CompressedSpec) for g in groups)
    )
    request = stepper.request(name)
    length = request.num_computed_tokens - request.num_in_flight_tokens
    width = -(-length // builder.block_size)
    table = torch.from_numpy(
        runner.input_batch.block_table[group].block_table.np[row][None, :width]
    )
    layout = builder.page_layout()
    state, size, num_heads = builder.state, builder.block_size, builder.num_kv_heads
    contexts = runner.compilation_config.static_forward_context
    keys, ids = [], []
    for layer, layer_row in sorted(builder.layer_rows.items(), key=lambda item: item[1]):
        cache = contexts[layer].kv_cache
        cache = cache[0] if isinstance(cache, list) else cache
        pages = cache.view(cache.shape[0] * cache.shape[1], -1)
        tables, kv_len = state.tables(
            0 if builder.even else layer_row,
            torch.tensor([slot]),
            table,
            torch.tensor([length], dtype=torch.int32),
            size,
            width,
        )
        keys.append([])
        ids.append([])
        for head in range(num_heads):
            count = int(kv_len[head])
            used = tables[head, : -(-count // size)].long()
            rows = pages[used].float()
            rows = (
                rows[:, layout.key_index]
                if layout.key_index is not None
                else rows.unflatten(1, (size, 2, -1))[:, :, 0].flatten(1)
            )
            keys[-1].append(rows.reshape(-1, layout.head_size)[:count].numpy())
            ids[-1].append(used.tolist())
    return HeldPages(keys, ids, length)


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
            assert worst < 1e-4, f"layer {layer} head {head}: a page holds no key of this prompt"
            result[-1].append(nearest)
    return result


def assert_kept(
    held: HeldPages, reference: np.ndarray, kept: Iterable[Iterable[np.ndarray]]
) -> None:
    """The pages hold exactly the given positions, ascending, and no page has two owners."""
    for layer, (got, expected) in enumerate(zip(positions_of(held, reference), kept, strict=True)):
        for head, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.tolist() == list(b), f"layer {layer} head {head} keeps other positions"
    for heads in held.page_ids:
        every = [page for ids in heads for page in ids]
        assert len(every) == len(set(every))
