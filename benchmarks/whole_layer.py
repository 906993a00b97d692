# SPDX-License-Identifier: Apache-2.0
"""All that compression does to one layer, in a row, as ``kernel_bench.py`` times it.

Ours are the steps of ``bacon`` on paged keys: score, calibrate, select, compact. ``einsum`` is the
code path of projects around SnapKV, ``kvpress`` that project's SnapKV press. Both start from
contiguous keys and values, do not calibrate, and leave contiguous ones.
"""

import functools
from types import ModuleType

import torch
from gpucheck.stress import Compaction, in_place
from operations import (
    BACON,
    POOLING,
    WINDOW,
    Cost,
    Inputs,
    Operation,
    Shape,
    compact_cost,
    compaction_of,
    entries,
    repeated_window,
    require,
    scores_cost,
)
from rivals import Calls, Rival, kv_press
from torch.nn import functional

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import reference

KERNEL = int(POOLING["kernel"])


def layer_cost(shape: Shape) -> Cost:
    """Keys are read once, kept tokens moved once; scores need not leave the chip."""
    scores, moved = scores_cost(shape), compact_cost(shape)
    plain_bytes = scores.plain_bytes + moved.plain_bytes + 2 * shape.page_bytes
    plain_bytes += 200 * entries(shape)
    return Cost(shape.page_bytes // 2 + moved.bytes, scores.flops, plain_bytes)


def select(operations: ModuleType, x: Inputs) -> torch.Tensor:
    """Kept positions [N, Hkv, K] by the operations of a module."""
    if operations is reference:
        keys = reference.read_prompt(x.prompts, "key")
        mean, last = reference.window_scores(x.queries, keys, x.prompt_lens, x.scale)
    else:
        mean, last = kernels.window_scores(x.queries, x.prompts, x.prompt_lens, x.scale)
    base, evidence = operations.bacon_evidence(mean, last, x.num_candidates, **POOLING)
    final = operations.bacon_calibrate(
        base, evidence, x.trace, x.num_candidates, x.capacity, **BACON
    )
    tokens = x.count * x.prompts.layout.block_size
    return operations.select_tokens(
        final, tokens, x.num_candidates, x.prompt_lens, x.shape.num_kept
    )


def compress(operations: ModuleType, x: Inputs, tables: Compaction) -> None:
    in_place(operations, x.prompts, tables._replace(kept=select(operations, x)))


def einsum_compress(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [N, Hkv, num_kept, D] that stay: the best of the prefix, then the window."""
    probs = repeated_window(queries, keys)[..., :-WINDOW].mean(2)  # [N, Hq, T - W]
    pooled = functional.avg_pool1d(probs, KERNEL, stride=1, padding=KERNEL // 2)
    scores = pooled.unflatten(1, (keys.shape[1], -1)).mean(2)
    best = (
        scores.topk(num_kept - WINDOW, dim=2).indices[..., None].expand(-1, -1, -1, keys.shape[3])
    )

    def kept(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[:, :, :-WINDOW].gather(2, best), rows[:, :, -WINDOW:]], dim=2)

    return kept(keys), kept(values)


def layer_calls(x: Inputs) -> Calls:
    @functools.cache
    def contiguous() -> tuple[torch.Tensor, torch.Tensor]:  # by the first call, which is not timed
        keys, values = (reference.read_prompt(x.prompts, part) for part in ("key", "value"))
        return keys.contiguous(), values.contiguous()

    def einsum() -> tuple[torch.Tensor, torch.Tensor]:
        return einsum_compress(x.queries, *contiguous(), x.shape.num_kept)

    def press():
        return kv_press(x.queries, *contiguous(), x.shape.num_kept)

    def right(result: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """As many tokens as we keep; which ones is another method's affair."""
        return result[0].shape[2] == x.shape.num_kept

    tables = compaction_of(x)
    return {
        "ours": lambda: compress(kernels, x, tables),
        "torch": lambda: compress(reference, x, tables),
        "einsum": einsum,
        "kvpress": Rival(press, right),
    }


def layer_check(x: Inputs) -> None:
    """The same tokens, but for near ties."""
    ours, plain = select(kernels, x), select(reference, x)
    kept = torch.zeros((*x.base.shape[:2], x.shape.length + 1), device=ours.device)
    agree = kept.scatter_(2, plain, 1.0).gather(2, ours).mean()
    require(agree >= 0.99, "compress_layer")


COMPRESS_LAYER = Operation("compress_layer", layer_cost, layer_calls, layer_check, "select_tokens")
