# SPDX-License-Identifier: Apache-2.0
"""The C++ operations of csrc/cpu, when this installation was built with them."""

import functools
import importlib.util

import torch

from vllm_kvcompress.kernels.reference import PageLayout, PromptPages, index_tables
from vllm_kvcompress.kernels.reference_decode import HeldPages
from vllm_kvcompress.kernels.reference_grid import Grids
from vllm_kvcompress.kernels.reference_rows import log_share, share_of


def available() -> bool:
    """Whether the operations were built; loads them.

    Raises:
        RuntimeError: they were built for another torch.
    """
    return load("vllm_kvcompress._cpu")


@functools.cache
def load(name: str) -> bool:
    """Load a library of operations, if it was built.

    Raises:
        RuntimeError: it was built for another torch.
    """
    library = importlib.util.find_spec(name)
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


def _orders(layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where pages keep keys and values: [block_size * D] int64 each, also for token rows."""
    key_index, value_index = index_tables(layout, torch.device("cpu"))
    return key_index.flatten(), value_index.flatten()


def _keys(prompts: PromptPages) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """What tells the operations where the keys of prompts stand; scales go with the logits."""
    return (*prompts[:3], _orders(prompts.layout)[0])


def _logit_scale(prompts: PromptPages, scale: torch.Tensor) -> torch.Tensor:
    """What the logits of each row are multiplied by when keys come as they are stored: [R]."""
    return scale if prompts.key_scale is None else scale * prompts.key_scale


def read_prompt(prompts: PromptPages, part: str) -> torch.Tensor:
    """See ``reference.read_prompt``; the result is float32."""
    pages, block_table, num_kv_heads, layout, key_scale, value_scale = prompts
    is_key = part == "key"
    index = _orders(layout)[0 if is_key else 1]
    scale = key_scale if is_key else value_scale
    return torch.ops.vllm_kvcompress.read_prompt(
        pages, block_table, num_kv_heads, index, layout.head_size, scale
    )


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``, on paged keys."""
    return torch.ops.vllm_kvcompress.window_scores(
        queries,
        *_keys(prompts),
        prompt_lens,
        _logit_scale(prompts, scale),
        softcap,
        reduction == "max",
    )


def key_attention_sum(
    queries: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
    prompts: PromptPages,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.key_attention_sum``, on paged keys."""
    return torch.ops.vllm_kvcompress.key_attention_sum(
        queries,
        lengths,
        positions,
        *_keys(prompts),
        _logit_scale(prompts, scale),
        softcap,
    )


def group_attention_sum(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    num_groups: int,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.group_attention_sum``, on paged keys."""
    return torch.ops.vllm_kvcompress.group_attention_sum(
        queries,
        *_keys(prompts),
        prompt_lens,
        num_groups,
        _logit_scale(prompts, scale),
        softcap,
    )


def gaussian_logits(
    mean: torch.Tensor, covariance: torch.Tensor, prompts: PromptPages, scale: torch.Tensor
) -> torch.Tensor:
    """See ``reference_paged.gaussian_logits``."""
    return torch.ops.vllm_kvcompress.gaussian_logits(
        mean, covariance, *_keys(prompts), _logit_scale(prompts, scale)
    )


def cover_votes(masses: torch.Tensor, end: torch.Tensor, tau: float, cover: str) -> torch.Tensor:
    """See ``reference.cover_votes``."""
    return torch.ops.vllm_kvcompress.cover_votes(masses, end, share_of(tau), cover == "floor")


def last_row_logits(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.last_row_logits``; keys before the instruction are not read."""
    return torch.ops.vllm_kvcompress.last_row_logits(
        queries,
        *_keys(prompts),
        prompt_lens,
        instruction_len,
        _logit_scale(prompts, scale),
        softcap,
    )


def elite_attention(
    queries: torch.Tensor,
    elite: torch.Tensor,
    segment: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.elite_attention``, on paged keys."""
    return torch.ops.vllm_kvcompress.elite_attention(
        queries,
        elite,
        segment,
        *_keys(prompts),
        prompt_lens,
        _logit_scale(prompts, scale),
        softcap,
    )


def strong_key_counts(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    threshold: float = 0.01,
) -> torch.Tensor:
    """See ``reference.strong_key_counts``, on paged keys."""
    return torch.ops.vllm_kvcompress.strong_key_counts(
        queries,
        *_keys(prompts),
        prompt_lens,
        instruction_len,
        _logit_scale(prompts, scale),
        softcap,
        log_share(threshold),
    )


def pool_prefix(
    scores: torch.Tensor,
    num_candidates: torch.Tensor,
    kernel: int,
    kind: str = "avg",
    grids: Grids | None = None,
) -> torch.Tensor:
    """See ``reference.pool_prefix``."""
    if kernel == 1:
        return scores
    return torch.ops.vllm_kvcompress.pool_prefix(
        scores, num_candidates, kernel, kind == "max", None if grids is None else grids.lines
    )


def grid_balance(scores: torch.Tensor, num_candidates: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See ``reference.grid_balance``."""
    return torch.ops.vllm_kvcompress.grid_balance(scores, num_candidates, grids.lines)


def weigh_scores(
    base: torch.Tensor,
    num_candidates: torch.Tensor,
    weight: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    *,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See ``reference.weigh_scores``."""
    found, more = torch.ops.vllm_kvcompress.weigh_scores(base, num_candidates, weight, last, clamp)
    return found, None if last is None else more


def output_norms(prompts: PromptPages, grams: torch.Tensor) -> torch.Tensor:
    """See ``reference_paged.output_norms``."""
    return torch.ops.vllm_kvcompress.output_norms(
        *prompts[:3], _orders(prompts.layout)[1], grams, prompts.value_scale
    )


def bacon_evidence(
    mean: torch.Tensor, last: torch.Tensor, num_candidates: torch.Tensor, *, kernel: int, pool: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.bacon_evidence``."""
    return torch.ops.vllm_kvcompress.bacon_evidence(
        mean, last, num_candidates, kernel, pool == "max"
    )


def bacon_calibrate(
    base: torch.Tensor,
    evidence: torch.Tensor,
    trace: torch.Tensor,
    num_candidates: torch.Tensor,
    capacity: torch.Tensor,
    grids: Grids | None = None,
    *,
    trace_r: int,
    mode: str,
    local_k: int,
    lambda_c: float,
    topk_frac: float,
) -> torch.Tensor:
    """See ``reference.bacon_calibrate``."""
    return torch.ops.vllm_kvcompress.bacon_calibrate(
        base,
        evidence,
        trace,
        num_candidates,
        capacity,
        None if grids is None else grids.lines,
        trace_r,
        mode,
        local_k,
        lambda_c,
        topk_frac,
    )


def apportion(
    shares: torch.Tensor, total: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """See ``reference.apportion``."""
    return torch.ops.vllm_kvcompress.apportion(shares, total, low, high)


def head_counts(base: torch.Tensor, capacity: torch.Tensor, normalize: bool) -> torch.Tensor:
    """See ``reference.head_counts``."""
    return torch.ops.vllm_kvcompress.head_counts(base, capacity, normalize)


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """See ``reference.select_tokens``."""
    return torch.ops.vllm_kvcompress.select_tokens(
        scores, count, candidate_end, protected_end, max_count
    )


def stage_tokens(
    prompts: PromptPages,
    kept: torch.Tensor,
    page_count: torch.Tensor,
    page_start: torch.Tensor,
    staged: torch.Tensor,
) -> None:
    """See ``reference.stage_tokens``."""
    layout = prompts.layout
    torch.ops.vllm_kvcompress.stage_tokens(
        prompts.pages,
        prompts.block_table,
        kept,
        page_count,
        page_start,
        *_orders(layout),
        layout.block_size,
        layout.head_size,
        staged,
    )


def write_pages(
    prompts: PromptPages,
    staged: torch.Tensor,
    num_pages: torch.Tensor,
    num_full_blocks: torch.Tensor,
    num_kept_blocks: torch.Tensor,
    layer_pages: int,
) -> None:
    """See ``reference.write_pages``; other pages are not touched."""
    layout = prompts.layout
    torch.ops.vllm_kvcompress.write_pages(
        *prompts[:3],
        staged,
        num_pages,
        num_full_blocks,
        num_kept_blocks,
        *_orders(layout),
        layout.block_size,
        layout.head_size,
        layer_pages,
    )


def head_page_tables(
    table: torch.Tensor,
    kv_len: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    held: HeldPages,
    block_size: int,
) -> None:
    """See ``reference_decode.head_page_tables``; what is written has to be contiguous."""
    torch.ops.vllm_kvcompress.head_page_tables(
        table, kv_len, block_table, seq_lens, *held, block_size
    )
