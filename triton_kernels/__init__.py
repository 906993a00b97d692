# SPDX-License-Identifier: Apache-2.0
"""The tensor operations of compression (installed as ``vllm_kvcompress.kernels``).

Layouts and terms:

    head page   block_size tokens of one KV head; page id = block * Hkv + head inside one layer
    block_table [R, B] block ids of each request
    T           positions 0 .. T-1 of the longest prompt of a batch, rounded up to blocks
"""

from vllm_kvcompress.kernels.reference import (
    PageLayout,
    calibrate,
    compact_pages,
    head_page_tables,
    pool_prefix,
    read_prompt,
    select_tokens,
    window_scores,
)

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
