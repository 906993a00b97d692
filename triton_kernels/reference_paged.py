# SPDX-License-Identifier: Apache-2.0
"""Definitions that read keys from pages; on keys in token order they stand in ``reference.py``."""

import torch

from vllm_kvcompress.kernels import reference
from vllm_kvcompress.kernels.reference import PromptPages


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``; T is B * block_size."""
    keys = reference.read_prompt(prompts, "key")
    return reference.window_scores(queries, keys, prompt_lens, scale, softcap, reduction)


def column_sums(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    prompts: PromptPages,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.column_sums``; T is B * block_size."""
    keys = reference.read_prompt(prompts, "key")
    return reference.column_sums(queries, lengths, positions, keys, scale, softcap)
