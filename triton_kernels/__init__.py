# SPDX-License-Identifier: Apache-2.0
"""The tensor operations of compression (installed as ``vllm_kvcompress.kernels``).

Layouts and terms:

    head page   block_size tokens of one KV head; page id = block * Hkv + head inside one layer
    block_table [R, B] block ids of each request
    T           positions 0 .. T-1 of the longest prompt of a batch, rounded up to blocks

Every operation is defined in ``reference.py``. Where the device has a faster one, the name here
picks it: Triton on a GPU, C++ on a CPU.
"""

import torch

from vllm_kvcompress.kernels import native, reference
from vllm_kvcompress.kernels.reference import (
    PageLayout,
    PromptPages,
    calibrate,
    pool_prefix,
    select_tokens,
)


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
    """See ``reference.window_scores``, on paged keys; Triton on a GPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import window_attention

        return window_attention.window_scores(
            queries, prompts, prompt_lens, scale, softcap, reduction
        )
    keys = read_prompt(prompts, "key")
    return reference.window_scores(queries, keys, prompt_lens, scale, softcap, reduction)


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """See ``reference.read_prompt``; C++ for the page layouts of a CPU, which returns float32."""
    if _native(prompts.pages, prompts.layout):
        return native.read_prompt(prompts, part)
    return reference.read_prompt(prompts, part)


def compact_pages(prompts: PromptPages, *args: torch.Tensor) -> None:
    """See ``reference.compact_pages``; Triton on a GPU, C++ for the page layouts of a CPU."""
    if prompts.pages.is_cuda:
        from vllm_kvcompress.kernels import compaction

        compaction.compact_pages(prompts, *args)
    elif _native(prompts.pages, prompts.layout):
        native.compact_pages(prompts, *args)
    else:
        reference.compact_pages(prompts, *args)


def _native(pages: torch.Tensor, layout: PageLayout) -> bool:
    return not pages.is_cuda and layout.key_index is not None and native.available()


def describe(device_type: str) -> str:
    """What runs on a device, for the start-up line."""
    if device_type == "cuda":
        return "window_scores, compact_pages and head_page_tables in Triton, the rest in torch"
    if native.available():
        return "read_prompt and compact_pages in C++, the rest in torch"
    return "torch (C++ was not built: install with --no-build-isolation and a compiler)"


__all__ = [
    "PageLayout",
    "PromptPages",
    "calibrate",
    "compact_pages",
    "describe",
    "head_page_tables",
    "pool_prefix",
    "read_prompt",
    "select_tokens",
    "window_scores",
]
