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
    calibrate,
    pool_prefix,
    select_tokens,
    window_scores,
)


def head_page_tables(
    block_table: torch.Tensor, *args: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.head_page_tables``; one Triton launch on a GPU."""
    if block_table.is_cuda:
        from vllm_kvcompress.kernels import page_tables  # CPU installations may lack Triton

        return page_tables.head_page_tables(block_table, *args)
    return reference.head_page_tables(block_table, *args)


def read_prompt(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    num_kv_heads: int,
    layout: PageLayout,
    part: str,
) -> torch.Tensor:
    """See ``reference.read_prompt``; C++ for the page layouts of a CPU, which returns float32."""
    if pages.is_cuda or layout.key_index is None or not native.available():
        return reference.read_prompt(pages, block_table, num_kv_heads, layout, part)
    return native.read_prompt(pages, block_table, num_kv_heads, layout, part)


def compact_pages(pages: torch.Tensor, *args) -> None:
    """See ``reference.compact_pages``; C++ for the page layouts of a CPU."""
    layout = args[-1]
    if pages.is_cuda or layout.key_index is None or not native.available():
        reference.compact_pages(pages, *args)
    else:
        native.compact_pages(pages, *args)


def describe(device_type: str) -> str:
    """What runs on a device, for the start-up line."""
    if device_type == "cuda":
        return "head_page_tables in Triton, the rest in torch"
    if native.available():
        return "read_prompt and compact_pages in C++, the rest in torch"
    return "torch (C++ was not built: install with --no-build-isolation and a compiler)"


__all__ = [
    "PageLayout",
    "calibrate",
    "compact_pages",
    "describe",
    "head_page_tables",
    "pool_prefix",
    "read_prompt",
    "select_tokens",
    "window_scores",
]
