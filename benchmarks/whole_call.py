# SPDX-License-Identifier: Apache-2.0
"""Compression of all layers of a model in one call, as ``kernel_bench.py`` times it.

Ours is what a worker calls before a step: the pipeline with every launch, and the time that the
host takes for them. ``einsum`` is the code path of projects around SnapKV, ``kvpress`` that
project's SnapKV press, both layer by layer; they start from contiguous keys and values, do not
calibrate, and leave contiguous ones.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from launches import count
from operations import (
    POOLING,
    WINDOW,
    Cost,
    Inputs,
    Operation,
    Shape,
    compact_cost,
    entries,
    repeated_window,
    require,
    scores_cost,
)
from pipeline_call import PipelineCall, Sizes
from rivals import Calls, Rival, Unsuitable, kv_press
from torch.nn import functional

from vllm_kvcompress import kernels
from vllm_kvcompress.kernels import PromptPages, reference
from vllm_kvcompress.kernels.operations import OPERATIONS, Implementation

KERNEL = int(POOLING["kernel"])
ROOM_SHARE = 0.4  # of free memory, for the pages of all layers: rivals copy them
AGREEMENT = 0.99  # of kept tokens with those of the plain definitions: near ties differ


def sizes_of(shape: Shape) -> Sizes:
    heads = shape.num_q_heads, shape.num_kv_heads, shape.head_size
    return Sizes(shape.num_layers, *heads, shape.length, shape.num, shape.num_kept)


def call_cost(shape: Shape) -> Cost:
    """Keys are read once, kept tokens moved once; scores need not leave the chip."""
    scores, moved = scores_cost(shape), compact_cost(shape)
    layers, pages = shape.num_layers, shape.num_layers * shape.page_bytes
    plain_bytes = scores.plain_bytes + moved.plain_bytes + 200 * entries(shape) + 3 * pages
    return Cost(layers * (shape.page_bytes // 2 + moved.bytes), layers * scores.flops, plain_bytes)


@contextlib.contextmanager
def definitions(device: torch.device) -> Iterator[None]:
    """Operations run as they are defined in torch."""
    chosen = [dict(operation._chosen) for operation in OPERATIONS.values()]
    for operation in OPERATIONS.values():
        operation._chosen[device.type] = Implementation(operation.definition, "torch")
    try:
        yield
    finally:
        for operation, before in zip(OPERATIONS.values(), chosen, strict=True):
            operation._chosen = before


@contextlib.contextmanager
def selections(select: Callable[..., torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """What ``select`` selects inside of the block. The plain selection is what goes on from there,
    so that a wrong one harms nothing else.
    """
    found: list[torch.Tensor] = []
    original = kernels.select_tokens

    def recorded(*args: object) -> torch.Tensor:
        found.append(select(*args))
        return reference.select_tokens(*args)  # type: ignore[arg-type]

    kernels.select_tokens = recorded  # type: ignore[assignment]
    try:
        yield found
    finally:
        kernels.select_tokens = original


def marked(kept: torch.Tensor, length: int) -> torch.Tensor:
    """Which positions [R, Hkv, T + 1] are kept; the last entry is nobody's."""
    found = torch.zeros(*kept.shape[:2], length + 1, dtype=torch.bool, device=kept.device)
    return found.scatter_(2, kept.clamp(max=length), True)[:, :, :length]


def call_check(x: Inputs, method: str) -> None:
    """The same tokens as the plain definitions keep, but for near ties."""
    call = PipelineCall(method, sizes_of(x.shape), x.base.device)
    pages = call.stack.pages.clone()
    with selections(kernels.select_tokens) as ours:
        call()
    call.stack.pages.copy_(pages)
    with definitions(x.base.device), selections(reference.select_tokens) as plain:
        call()
    both = total = 0
    for some, right in zip(ours, plain, strict=True):
        a, b = marked(some, x.shape.length), marked(right, x.shape.length)
        both, total = both + int((a & b).sum()), total + int(b.sum())
    require(both >= AGREEMENT * total, f"compress {method}")


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


def call_calls(x: Inputs, method: str) -> Calls:
    shape, device = x.shape, x.base.device

    @functools.cache
    def ours() -> PipelineCall:
        held = shape.num_layers * shape.page_bytes
        if device.type == "cuda" and held > ROOM_SHARE * torch.cuda.mem_get_info()[0]:
            raise Unsuitable(f"the pages of all layers take {held / 2**30:.0f} GiB")
        return PipelineCall(method, sizes_of(shape), device)

    def plain() -> torch.Tensor:
        with definitions(device):
            return ours()()

    @functools.cache
    def contiguous() -> list[tuple[torch.Tensor, ...]]:  # queries, keys and values of every layer
        stack, table, layout = ours().stack, ours().prompts.block_table, x.prompts.layout
        layers = stack.pages.split(stack.layer_pages)
        found = []
        for queries, pages in zip(stack.queries, layers, strict=True):
            prompts = PromptPages(pages, table, shape.num_kv_heads, layout)
            keys, values = (reference.read_prompt(prompts, part) for part in ("key", "value"))
            found.append((queries[:, -WINDOW:], keys.contiguous(), values.contiguous()))
        return found

    def einsum() -> tuple[torch.Tensor, torch.Tensor]:
        for layer in contiguous():
            result = einsum_compress(*layer, shape.num_kept)
        return result

    def press() -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        calls = [kv_press(*layer, shape.num_kept) for layer in contiguous()]
        return lambda: [call() for call in calls][-1]

    def right(result: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """As many tokens as we keep; which ones is another method's affair."""
        return result[0].shape[2] == shape.num_kept

    return {
        "ours": Rival(ours, lambda pages: True),
        "torch": plain,
        "einsum": Rival(lambda: einsum, right),
        "kvpress": Rival(press, right),
    }


WHOLE_CALLS = tuple(
    Operation(
        f"compress {method}",
        call_cost,
        functools.partial(call_calls, method=method),
        functools.partial(call_check, method=method),
        "select_tokens",
        launches=lambda shape, method=method: count(method, sizes_of(shape)).total,
    )
    for method in ("bacon", "bacon+adakv")
)
