# SPDX-License-Identifier: Apache-2.0
"""The C++ operations of csrc/cpu, when this installation was built with them."""

import functools
import importlib.util

import torch

from vllm_kvcompress.kernels.reference import PromptPages


@functools.cache
def available() -> bool:
    """Whether the operations were built; loads them.

    Raises:
        RuntimeError: they were built for another torch.
    """
    library = importlib.util.find_spec("vllm_kvcompress._cpu")
    if library is None:
        return False
    try:
        torch.ops.load_library(library.origin)
    except OSError as error:
        raise RuntimeError(
            f"vllm-kvcompress was built for another torch than {torch.__version__}: reinstall it "
            "with pip install --no-build-isolation --force-reinstall --no-deps"
        ) from error
    return True


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """See ``reference.read_prompt``; the result is float32."""
    pages, block_table, num_kv_heads, layout = prompts
    index = layout.key_index if part == "key" else layout.value_index
    return torch.ops.vllm_kvcompress.read_prompt(
        pages, block_table, num_kv_heads, index, layout.head_size
    )


def compact_pages(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
) -> None:
    """See ``reference.compact_pages``; pages that no head owns are not touched."""
    pages, block_table, _, layout = prompts
    torch.ops.vllm_kvcompress.compact_pages(
        pages,
        block_table,
        kept,
        page_count,
        page_start,
        num_full_blocks,
        num_kept_blocks,
        layout.key_index,
        layout.value_index,
        layout.block_size,
        layout.head_size,
    )
