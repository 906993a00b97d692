# SPDX-License-Identifier: Apache-2.0
"""Other people's code that ``kernel_bench.py`` times beside ours, where it can be imported.

None of it is needed. What is missing, does not run on this device or computes something else
becomes a row that says so.
"""

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton import TritonError

FAILURES = (
    ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, TritonError,
)  # fmt: skip
"""What code of other versions than expected raises."""

MOST_SPLITS = 32
"""Per sequence, as vLLM sets FlashAttention 3 up for full CUDA graphs."""


class Unsuitable(RuntimeError):
    """A rival does not run here; says why."""


class Absent(NamedTuple):
    """In place of an implementation that cannot be timed here."""

    why: str


class Rival(NamedTuple):
    """An implementation that may not be there, or not be right.

    Attributes:
        make: returns the call to time; whatever it allocates is the implementation's own.
        right: whether a result is what ours is.
    """

    make: Callable[[], Callable[[], Any]]
    right: Callable[[Any], bool]

    def ready(self) -> Callable[[], Any] | Absent:
        """The call, once its result was seen to be right."""
        try:
            call = self.make()
            result = call()
        except Unsuitable as error:
            return Absent(str(error))
        except FAILURES as error:
            return Absent(f"{type(error).__name__}: {error}".partition("\n")[0])
        return call if self.right(result) else Absent("its result differs from ours")


Calls = dict[str, Callable[[], Any] | Rival]
"""Implementations of an operation by name."""


def require_gpu(tensor: torch.Tensor) -> None:
    if not tensor.is_cuda:
        raise Unsuitable("runs on a GPU only")


def as_heads(pages: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, block_size, 1, D] of head pages, as views."""
    rows = pages.view(len(pages), -1, 1, 2 * head_size)
    return rows[..., :head_size], rows[..., head_size:]


class FlashAttention:
    """vLLM's own FlashAttention, one token of each sequence, as the adapter calls it.

    Args:
        queries: [S, G * H, D].
        keys, values: [pages, block_size, H, D], views of the cache.
        max_len: bound of the lengths that the host knows.
    """

    def __init__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, max_len: int
    ) -> None:
        require_gpu(queries)
        self.library = importlib.import_module("vllm.v1.attention.backends.fa_utils")
        self.version = self.library.get_flash_attn_version(head_size=queries.shape[2])
        self.queries, self.max_len = queries, max_len
        self.keys, self.values = keys, values
        self.starts = torch.arange(len(queries) + 1, dtype=torch.int32, device=queries.device)
        # not what other code has left in this memory, perhaps the right result
        self.out = torch.full_like(queries, float("nan"))

    def schedule(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """What layers with the same lengths share; None before FlashAttention 3."""
        if self.version != 3:
            return None
        return self.library.get_scheduler_metadata(
            batch_size=len(self.queries),
            max_seqlen_q=1,
            max_seqlen_k=self.max_len,
            num_heads_q=self.queries.shape[1],
            num_heads_kv=self.keys.shape[2],
            headdim=self.queries.shape[2],
            cache_seqlens=lengths,
            qkv_dtype=self.queries.dtype,
            cu_seqlens_q=self.starts,
            page_size=self.keys.shape[1],
            causal=True,
            num_splits=MOST_SPLITS,
        )

    def __call__(
        self, table: torch.Tensor, lengths: torch.Tensor, schedule: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention like the queries over page tables [S, width] int32."""
        self.library.flash_attn_varlen_func(
            q=self.queries,
            k=self.keys,
            v=self.values,
            out=self.out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=self.max_len,
            softmax_scale=self.queries.shape[2] ** -0.5,
            causal=True,
            block_table=table,
            scheduler_metadata=schedule,
            fa_version=self.version,
            num_splits=MOST_SPLITS if self.version == 3 else 0,
        )
        return self.out


def flash_infer(
    queries: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    jit: bool,
) -> Callable[[], torch.Tensor]:
    """FlashInfer's batched decode over a per-head batch, planned beforehand.

    Args:
        queries: [R * Hkv, G, D].
        pages: [num_pages, block_size * 2 * D].
        table, lengths: page tables [R * Hkv, width] and kv_len [R * Hkv], int32.
        jit: whether it may compile its kernels, which takes minutes.
    """
    require_gpu(queries)
    library = importlib.import_module("flashinfer")
    if not jit and importlib.util.find_spec("flashinfer_jit_cache") is None:
        raise Unsuitable("has to compile its kernels: --jit lets it")
    size = pages.shape[1] // (2 * queries.shape[2])
    num_pages = -(-lengths // size)
    used = torch.arange(table.shape[1], device=table.device) < num_pages[:, None]
    zero = num_pages.new_zeros(1)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=queries.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.cat([zero, num_pages.cumsum(0)]).int(),
        table[used],
        (lengths - (num_pages - 1) * size).int(),
        queries.shape[1],
        1,
        queries.shape[2],
        size,
        q_data_type=queries.dtype,
        kv_data_type=pages.dtype,
        sm_scale=queries.shape[2] ** -0.5,
    )
    keys, values = (part.transpose(1, 2) for part in as_heads(pages, queries.shape[2]))
    return lambda: wrapper.run(queries, (keys, values))


def x_formers(
    queries: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """xformers' split-K decode over a per-head batch, its tiles as large as a page.

    Args:
        queries, pages, table, lengths: as in :func:`flash_infer`.
    """
    require_gpu(queries)
    library = importlib.import_module("xformers.ops.fmha")
    num, group, head_size = queries.shape
    size = pages.shape[1] // (2 * head_size)
    masks, split_k = library.attn_bias, library.triton_splitk.FwOp
    mask = masks.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        [1] * num, lengths.tolist(), table, size, device=queries.device
    )
    operator = type("PageByPage", (split_k,), {"BLOCK_N": size})
    # a head's keys for all of its queries: strides of 0
    keys, values = (
        part.flatten(0, 1)[None].expand(-1, -1, group, -1) for part in as_heads(pages, head_size)
    )

    def call() -> torch.Tensor:
        return library.memory_efficient_attention_forward(
            queries[None], keys, values, mask, op=operator
        )[0]

    return call


def kv_press(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, num_kept: int
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """The SnapKV press on N prompts of one layer, its projection and its RoPE at no cost.

    Args:
        queries: [N, W, Hq, D] after RoPE.
        keys, values: [N, Hkv, T, D].
        num_kept: tokens left per head, window included.
    """
    if importlib.util.find_spec("kvpress") is None:
        raise Unsuitable("not importable here")
    library = importlib.import_module("kvpress")
    num, window, num_q_heads, head_size = queries.shape
    num_kv_heads, length = keys.shape[1:3]
    config = SimpleNamespace(num_attention_heads=num_q_heads, num_key_value_heads=num_kv_heads)
    layer = SimpleNamespace(
        config=config, head_dim=head_size, q_proj=lambda hidden: queries.flatten(2)
    )
    # int(T * (1 - ratio)) tokens stay
    press = library.SnapKVPress(1 - (num_kept + 0.5) / length, window_size=window)
    hidden = queries.new_zeros(num, window + 1, 1)
    turn = queries.new_ones(1, window, head_size)
    extra = {"position_embeddings": (turn, torch.zeros_like(turn))}
    return lambda: press.compress(layer, hidden, keys, values, None, extra)
