# SPDX-License-Identifier: Apache-2.0
"""Window scores straight from paged keys: K is read twice, nothing of size W x T is stored."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows
from vllm_kvcompress.kernels.reference import PromptPages

_KEYS_PER_SPLIT = 1024
_KEYS_PER_TILE = 64


@triton.jit
def _logits(
    q_ptr,
    pages_ptr,
    table_ptr,
    i_row,
    i_head,
    i_group,
    o_key,
    prompt_len,
    scale,
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Logits [BLOCK_W, keys] of one query head's window rows, -inf where hidden."""
    o_w = tl.arange(0, BLOCK_W)
    m_w, m_key = o_w < WINDOW, o_key < prompt_len
    b_q = query_rows.load_rows(
        q_ptr, i_row, o_w, i_group, m_w, WINDOW, num_q_heads, HEAD_SIZE, BLOCK_D
    )
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
        PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
    visible = o_key[None, :] <= prompt_len - WINDOW + o_w[:, None]
    return tl.where(visible & m_w[:, None] & m_key[None, :], b_z, float("-inf"))


@triton.jit
def _row_sums_kernel(
    q_ptr,  # [N, W, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [N, B] int64
    prompt_lens_ptr,  # [N] int64
    max_ptr,  # [N, Hq, splits, W] float32
    sum_ptr,  # [N, Hq, splits, W] float32
    scale,
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_splits,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Maximum and sum of exponentials of each window row, over one split of the keys."""
    i_row = tl.program_id(0).to(tl.int64) // num_q_heads
    i_group = tl.program_id(0) % num_q_heads
    i_split = tl.program_id(1)
    i_head = i_group // (num_q_heads // num_kv_heads)
    prompt_len = tl.load(prompt_lens_ptr + i_row)
    b_max = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_W,), tl.float32)
    first = i_split * KEYS_PER_SPLIT
    end = tl.minimum(prompt_len.to(tl.int32), first + KEYS_PER_SPLIT)
    for start in range(first, end, BLOCK_T):
        o_key = start + tl.arange(0, BLOCK_T)
        b_z = _logits(
            q_ptr, pages_ptr, table_ptr, i_row, i_head, i_group, o_key, prompt_len, scale, softcap,
            num_q_heads, num_kv_heads, num_blocks, WINDOW, HEAD_SIZE, PAGE_TOKENS, BLOCK_W, BLOCK_D,
            HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        b_max, b_sum = query_rows.add_tile(b_max, b_sum, b_z)
    o_w = tl.arange(0, BLOCK_W)
    offset = ((i_row * num_q_heads + i_group) * num_splits + i_split) * WINDOW + o_w
    tl.store(max_ptr + offset, b_max, mask=o_w < WINDOW)
    tl.store(sum_ptr + offset, b_sum, mask=o_w < WINDOW)


@triton.jit
def _scores_kernel(
    q_ptr,  # [N, W, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [N, B] int64
    prompt_lens_ptr,  # [N] int64
    lse_ptr,  # [N, Hq, W] float32
    mean_ptr,  # [N, Hkv, T] float32
    last_ptr,  # [N, Hkv, T] float32
    scale,
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    length,  # T
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Probabilities of one tile of keys, reduced over window rows and query heads."""
    i_row = tl.program_id(0).to(tl.int64) // num_kv_heads
    i_head = tl.program_id(0) % num_kv_heads
    group = num_q_heads // num_kv_heads
    first = tl.program_id(1) * BLOCK_T
    o_key = first + tl.arange(0, BLOCK_T)
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < WINDOW
    prompt_len = tl.load(prompt_lens_ptr + i_row)
    b_mean = tl.zeros((BLOCK_T,), tl.float32)
    b_last = tl.zeros((BLOCK_T,), tl.float32)
    # keys past the prompt have no scores
    for g in range(tl.where(first < prompt_len, group, 0)):
        i_group = i_head * group + g
        b_z = _logits(
            q_ptr, pages_ptr, table_ptr, i_row, i_head, i_group, o_key, prompt_len, scale, softcap,
            num_q_heads, num_kv_heads, num_blocks, WINDOW, HEAD_SIZE, PAGE_TOKENS, BLOCK_W, BLOCK_D,
            HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        p_lse = lse_ptr + (i_row * num_q_heads + i_group) * WINDOW + o_w
        b_p = tl.exp(b_z - tl.load(p_lse, mask=m_w, other=0.0)[:, None])
        mean = tl.sum(b_p, 0) / WINDOW
        last = tl.sum(tl.where(o_w[:, None] == WINDOW - 1, b_p, 0.0), 0)
        if TAKE_MAX:
            b_mean, b_last = tl.maximum(b_mean, mean), tl.maximum(b_last, last)
        else:
            b_mean += mean / group
            b_last += last / group
    scored = o_key < prompt_len - WINDOW
    offset = (i_row * num_kv_heads + i_head) * length + o_key
    tl.store(mean_ptr + offset, tl.where(scored, b_mean, 0.0), mask=o_key < length)
    tl.store(last_ptr + offset, tl.where(scored, b_last, 0.0), mask=o_key < length)


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``; keys are read through the block table, twice.

    Args:
        queries: [N, W, Hq, D].
        prompts: with token-row pages.

    Returns:
        Mean over the window and last row, each [N, Hkv, B * block_size] float32.
    """
    pages, block_table, num_kv_heads, layout = prompts
    block_size = layout.block_size
    num, window, num_q_heads, head_size = queries.shape
    num_blocks = block_table.shape[1]
    length = num_blocks * block_size
    queries, block_table = queries.contiguous(), block_table.contiguous()
    exact = queries.dtype == torch.float32
    sizes = {
        "WINDOW": window,
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": block_size,
        "BLOCK_W": max(16, triton.next_power_of_2(window)),
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_SOFTCAP": softcap != 0,
        "EXACT": exact,
        # products in float32 and conversions from float8 would spill registers
        "num_warps": 16 if exact else 8 if pages.element_size() == 1 else 4,
    }
    inputs = (queries, pages, block_table, prompt_lens)
    numbers = (scale * layout.key_scale, softcap, num_q_heads, num_kv_heads, num_blocks)

    num_splits = triton.cdiv(length, _KEYS_PER_SPLIT)
    partial = queries.new_empty((2, num, num_q_heads, num_splits, window), dtype=torch.float32)
    _row_sums_kernel[(num * num_q_heads, num_splits)](
        *inputs, partial[0], partial[1], *numbers, num_splits,
        KEYS_PER_SPLIT=_KEYS_PER_SPLIT, BLOCK_T=32 if exact else _KEYS_PER_TILE, **sizes,
    )  # fmt: skip
    lse = query_rows.combine(partial[0], partial[1])

    scores = queries.new_empty((2, num, num_kv_heads, length), dtype=torch.float32)
    _scores_kernel[(num * num_kv_heads, triton.cdiv(length, _KEYS_PER_TILE))](
        *inputs, lse, scores[0], scores[1], *numbers, length,
        TAKE_MAX=reduction == "max", BLOCK_T=_KEYS_PER_TILE, **sizes,
    )  # fmt: skip
    return scores[0], scores[1]
