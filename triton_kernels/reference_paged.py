# SPDX-License-Identifier: Apache-2.0
"""Definitions that read keys from pages; on keys in token order they stand in ``reference.py``.

T is B * block_size in all of them.
"""

import torch

from vllm_kvcompress.kernels import native, reference
from vllm_kvcompress.kernels.operations import Operation
from vllm_kvcompress.kernels.reference import PromptPages

# itself an operation: plain definitions are what a CPU runs where there is no C++ for the whole
read_prompt = Operation(reference.read_prompt, triton="prompt_rows", cpp=native.read_prompt)


KEYS_AT_ONCE = 2048
"""Keys whose products with the covariances of all query heads are in memory at the same time."""


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``."""
    keys = read_prompt(prompts, "key")
    return reference.window_scores(queries, keys, prompt_lens, scale, softcap, reduction)


def key_attention_sum(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    prompts: PromptPages,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.key_attention_sum``."""
    keys = read_prompt(prompts, "key")
    return reference.key_attention_sum(queries, lengths, positions, keys, scale, softcap)


def group_attention_sum(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    num_groups: int,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.group_attention_sum``."""
    keys = read_prompt(prompts, "key")
    return reference.group_attention_sum(queries, keys, prompt_lens, num_groups, scale, softcap)


def last_row_logits(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.last_row_logits``."""
    keys = read_prompt(prompts, "key")
    return reference.last_row_logits(queries, keys, prompt_lens, instruction_len, scale, softcap)


def elite_attention(
    queries: torch.Tensor,
    elite: torch.Tensor,
    segment: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.elite_attention``."""
    keys = read_prompt(prompts, "key")
    return reference.elite_attention(queries, elite, segment, keys, prompt_lens, scale, softcap)


def strong_key_counts(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    threshold: float = 0.01,
) -> torch.Tensor:
    """See ``reference.strong_key_counts``."""
    keys = read_prompt(prompts, "key")
    return reference.strong_key_counts(
        queries, keys, prompt_lens, instruction_len, scale, softcap, threshold
    )


def output_norms(prompts: PromptPages, grams: torch.Tensor) -> torch.Tensor:
    """How much of a layer's output each value makes: the norm ||Wo v||, mean over the group.

    Args:
        grams: [L, Hq, D, D] float32, Wo^T Wo of the part Wo of the output projection that reads a
            query head; of the layers of the R rows.

    Returns:
        [R, Hkv, T] float32; garbage past a prompt's end.
    """
    values = read_prompt(prompts, "value").float().unflatten(0, (len(grams), -1))
    grams = grams.unflatten(1, (prompts.num_kv_heads, -1))
    pieces = []
    for piece in values.split(KEYS_AT_ONCE, dim=3):  # [L, N, Hkv, T', D]
        squares = [
            (torch.matmul(piece, grams[:, None, :, g]) * piece).sum(-1)
            for g in range(grams.shape[2])
        ]
        pieces.append(torch.stack(squares).clamp_min(0).sqrt().mean(0))
    return torch.cat(pieces, dim=3).flatten(0, 1)


def gaussian_logits(
    mean: torch.Tensor, covariance: torch.Tensor, prompts: PromptPages, scale: torch.Tensor
) -> torch.Tensor:
    """Log of the expected exponential of the logits of normally distributed queries.

    Args:
        mean: [R, Hq, D] float32, mean of each query head's queries.
        covariance: [R, Hq, D, D] float32.
        scale: [R] float32, of the logits.

    Returns:
        [R, Hq, T] float32: scale * k mean + scale^2 / 2 * k covariance k for each key k; garbage
        past a prompt's end.
    """
    keys = read_prompt(prompts, "key").float()[:, :, None]  # [R, Hkv, 1, T, D]
    heads = (prompts.num_kv_heads, -1)
    mean, covariance = mean.unflatten(1, heads), covariance.unflatten(1, heads)
    pieces = [
        (torch.matmul(piece, covariance) * piece).sum(-1)
        for piece in keys.split(KEYS_AT_ONCE, dim=3)
    ]
    factor = scale.double()[:, None, None, None]
    linear = factor.float() * torch.matmul(mean, keys[:, :, 0].transpose(2, 3))
    return (linear + (0.5 * factor.square()).float() * torch.cat(pieces, dim=3)).flatten(1, 2)
