# SPDX-License-Identifier: Apache-2.0
"""The tensor operations of compression (installed as ``vllm_kvcompress.kernels``).

Layouts and terms:

    head page   block_size tokens of one KV head; page id = block * Hkv + head inside one layer
    block_table [R, B] block ids of each request
    T           positions 0 .. T-1 of the longest prompt of a batch, rounded up to blocks

Every operation is defined in ``reference.py``. Where the device has a faster one, the name here
picks it: Triton on a GPU, C++ on a CPU.
"""

from types import ModuleType

import torch

from vllm_kvcompress.kernels import native, reference
from vllm_kvcompress.kernels.reference import PageLayout, PromptPages, as_bytes, as_stored


def head_page_tables(
    block_table: torch.Tensor, *args: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.head_page_tables``; one Triton launch on a GPU."""
    if block_table.is_cuda:
        from vllm_kvcompress.kernels import page_tables  # CPU installations may lack Triton

        return page_tables.head_page_tables(block_table, *args)
    return reference.head_page_tables(block_table, *args)


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``, on paged keys; Triton on a GPU, C++ on a CPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import window_attention

        return window_attention.window_scores(
            queries, prompts, prompt_lens, scale, softcap, reduction
        )
    if _native(prompts.pages, prompts.layout):
        return native.window_scores(queries, prompts, prompt_lens, scale, softcap, reduction)
    keys = read_prompt(prompts, "key")
    return reference.window_scores(queries, keys, prompt_lens, scale, softcap, reduction)


def column_sums(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    prompts: PromptPages,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.column_sums``, on paged keys; Triton on a GPU, C++ on a CPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import column_attention

        return column_attention.column_sums(queries, lengths, positions, prompts, scale, softcap)
    if _native(prompts.pages, prompts.layout):
        return native.column_sums(queries, lengths, positions, prompts, scale, softcap)
    keys = read_prompt(prompts, "key")
    return reference.column_sums(queries, lengths, positions, keys, scale, softcap)


def pool_prefix(
    scores: torch.Tensor, num_scored: torch.Tensor, kernel: int, kind: str = "avg"
) -> torch.Tensor:
    """See ``reference.pool_prefix``; one Triton launch on a GPU, C++ on a CPU."""
    if scores.is_cuda:
        from vllm_kvcompress.kernels import calibration

        return calibration.pool_prefix(scores, num_scored, kernel, kind)
    return _on_host().pool_prefix(scores, num_scored, kernel, kind)


def calibrate_scores(
    mean: torch.Tensor, *args: torch.Tensor | list[torch.Tensor], **options: float | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``reference.calibrate_scores``; two Triton launches on a GPU, C++ on a CPU."""
    if mean.is_cuda:
        from vllm_kvcompress.kernels import calibration

        return calibration.calibrate_scores(mean, *args, **options)
    return _on_host().calibrate_scores(mean, *args, **options)


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    num_candidates: torch.Tensor,
    pinned_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """See ``reference.select_tokens``; Triton on a GPU, C++ on a CPU."""
    if scores.is_cuda:
        from vllm_kvcompress.kernels import selection

        return selection.select_tokens(scores, count, num_candidates, pinned_end, max_count)
    return _on_host().select_tokens(scores, count, num_candidates, pinned_end, max_count)


def head_counts(base: torch.Tensor, capacity: torch.Tensor, normalize: bool) -> torch.Tensor:
    """See ``reference.head_counts``; two Triton launches on a GPU, C++ on a CPU."""
    if base.is_cuda:
        from vllm_kvcompress.kernels import head_budgets

        return head_budgets.head_counts(base, capacity, normalize)
    return _on_host().head_counts(base, capacity, normalize)


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """See ``reference.read_prompt``; C++ for the page layouts of a CPU, which returns float32."""
    if _native(prompts.pages, prompts.layout):
        return native.read_prompt(prompts, part)
    return reference.read_prompt(prompts, part)


def stage_tokens(prompts: PromptPages, kept: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """See ``reference.stage_tokens``; Triton on a GPU, C++ for the page layouts of a CPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import compaction

        return compaction.stage_tokens(prompts, kept, count)
    if _native(prompts.pages, prompts.layout):
        return native.stage_tokens(prompts, kept, count)
    return reference.stage_tokens(prompts, kept, count)


def write_pages(prompts: PromptPages, *args: torch.Tensor | int) -> None:
    """See ``reference.write_pages``; Triton on a GPU, C++ for the page layouts of a CPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import compaction

        compaction.write_pages(prompts, *args)
    elif _native(prompts.pages, prompts.layout):
        native.write_pages(prompts, *args)
    else:
        reference.write_pages(prompts, *args)


def _on_host() -> ModuleType:
    """The module with the operations on scores that lie in the memory of the host."""
    return native if native.available() else reference


def _native(pages: torch.Tensor, layout: PageLayout) -> bool:
    return not pages.is_cuda and layout.key_index is not None and native.available()


def describe(device_type: str) -> str:
    """What runs on a device, for the start-up line."""
    if device_type == "cuda":
        return "read_prompt in torch, the rest in Triton"
    if native.available():
        return "C++ for everything but head_page_tables, which is torch"
    return "torch (C++ was not built: install with --no-build-isolation and a compiler)"


__all__ = [
    "PageLayout",
    "PromptPages",
    "as_bytes",
    "as_stored",
    "calibrate_scores",
    "column_sums",
    "describe",
    "head_counts",
    "head_page_tables",
    "pool_prefix",
    "read_prompt",
    "select_tokens",
    "stage_tokens",
    "window_scores",
    "write_pages",
]
