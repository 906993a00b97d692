# SPDX-License-Identifier: Apache-2.0
"""The tensor operations of compression (installed as ``vllm_kvcompress.kernels``).

Layouts and terms:

    head page   block_size tokens of one KV head; page id = block * Hkv + head inside one layer
    block_table [R, B] block ids of each request
    T           positions 0 .. T-1 of the longest prompt of a batch, rounded up to blocks
"""

import torch

from vllm_kvcompress.kernels import reference
from vllm_kvcompress.kernels.reference import (
    PageLayout,
    calibrate,
    compact_pages,
    pool_prefix,
    read_prompt,
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


__all__ = [
    "PageLayout",
    "calibrate",
    "compact_pages",
    "head_page_tables",
    "pool_prefix",
    "read_prompt",
    "select_tokens",
    "window_scores",
]
