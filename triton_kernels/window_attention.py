# SPDX-License-Identifier: Apache-2.0
"""Window scores straight from paged keys: K is read twice, nothing of size W x T is stored.

The window rows of all query heads of a KV head are rows of one matrix, of BLOCK_R rows at a time:
BLOCK_R // PADDED query heads, PADDED rows for each. A program keeps them on the chip and walks over
its keys. Logits are to the base 2, which is what the hardware's exponential takes.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows, splits
from vllm_kvcompress.kernels.reference import PromptPages

_UNSPECIALIZED = ["num_blocks", "num_parts", "parts_each"]  # so that fewer variants are compiled


@triton.jit
def _tile_rows(i_tile, group, WINDOW: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Query head inside the group and window row of each row of a tile, and which there are."""
    o_r = tl.arange(0, BLOCK_R)
    o_head = i_tile * (BLOCK_R // PADDED) + o_r // PADDED
    o_w = o_r % PADDED
    return o_head, o_w, (o_w < WINDOW) & (o_head < group)


@triton.jit
def _logits(
    b_q,
    pages_ptr,
    table_ptr,
    i_row,
    i_head,
    o_key,
    o_w,
    prompt_len,
    scale,
    softcap,
    num_kv_heads,
    num_blocks,
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    HIDES: tl.constexpr,
):
    """Logits [BLOCK_R, keys] to the base 2. HIDES: -inf where a row does not see a key."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    m_key = o_key < prompt_len
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
        PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    if HAS_SOFTCAP:
        b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT) * LOG2_E
    else:
        b_z = paged_keys.logits(b_q, b_k, scale * LOG2_E, softcap, HAS_SOFTCAP, EXACT)
    if HIDES:
        visible = o_key[None, :] <= prompt_len - WINDOW + o_w[:, None]
        b_z = tl.where(visible & m_key[None, :], b_z, float("-inf"))
    return b_z


@triton.jit
def _add_tile(b_max, b_sum, b_z):
    """``query_rows.add_tile`` to the base 2."""
    new_max = tl.maximum(b_max, tl.max(b_z, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_sum = b_sum * tl.exp2(b_max - shift) + tl.sum(tl.exp2(b_z - shift[:, None]), 1)
    return new_max, b_sum


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _row_sums_kernel(
    q_ptr,  # [R, W, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    max_ptr,  # [R, Hkv, parts, tiles * BLOCK_R] float32
    sum_ptr,  # [R, Hkv, parts, tiles * BLOCK_R] float32
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_parts,
    parts_each,  # of a program
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEYS_PER_PART: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Maximum and sum of exponentials of each window row, over some parts of the keys."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_kv_heads, i_seq % num_kv_heads
    i_tile, num_tiles = tl.program_id(2), tl.num_programs(2)
    group = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    o_head, o_w, m_r = _tile_rows(i_tile, group, WINDOW, PADDED, BLOCK_R)
    b_q = query_rows.load_rows(
        q_ptr, i_row, o_w, i_head * group + o_head, m_r, WINDOW, num_q_heads, HEAD_SIZE, BLOCK_D
    )
    b_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    first = tl.program_id(1) * parts_each * KEYS_PER_PART
    end = tl.minimum(prompt_len, first + parts_each * KEYS_PER_PART)
    # tiles of keys that every row sees come first
    all_see = tl.maximum(tl.minimum(end, prompt_len - WINDOW) - first, 0) // BLOCK_T * BLOCK_T
    o_out = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    for HIDES in tl.static_range(2):
        begin = first + all_see if HIDES else first
        stop = end if HIDES else first + all_see
        for start in range(begin, stop, BLOCK_T):
            b_z = _logits(
                b_q, pages_ptr, table_ptr, i_row, i_head, start + tl.arange(0, BLOCK_T), o_w,
                prompt_len, scale, softcap, num_kv_heads, num_blocks, WINDOW, HEAD_SIZE,
                PAGE_TOKENS, BLOCK_D, HAS_SOFTCAP, EXACT, HIDES,
            )  # fmt: skip
            b_max, b_sum = _add_tile(b_max, b_sum, b_z)
            # a part ends: no branch, which would keep loads of the next tile from being early
            ends = ((start + BLOCK_T) % KEYS_PER_PART == 0) | (start + BLOCK_T >= end)
            i_part = i_seq * num_parts + start // KEYS_PER_PART
            offset = i_part * num_tiles * BLOCK_R + o_out
            tl.store(max_ptr + offset, b_max, mask=m_r & ends)
            tl.store(sum_ptr + offset, b_sum, mask=m_r & ends)
            b_max = tl.where(ends, float("-inf"), b_max)
            b_sum = tl.where(ends, 0.0, b_sum)


@triton.jit
def _reduced(
    b_p, o_w, WINDOW: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr, TAKE_MAX: tl.constexpr,
):  # fmt: skip
    """Probabilities [BLOCK_R, keys] summed over the window, and the last row's, over the heads."""
    b_end = tl.where(o_w[:, None] == WINDOW - 1, b_p, 0.0)
    if TAKE_MAX:
        b_heads = tl.sum(tl.reshape(b_p, (BLOCK_R // PADDED, PADDED, BLOCK_T)), 1)
        return tl.max(b_heads, 0), tl.max(b_end, 0)
    return tl.sum(b_p, 0), tl.sum(b_end, 0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _scores_kernel(
    q_ptr,  # [R, W, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    lse_ptr,  # [R, Hkv, tiles * BLOCK_R] float32
    mean_ptr,  # [R, Hkv, T] float32
    last_ptr,  # [R, Hkv, T] float32
    softcap,
    num_q_heads,
    num_kv_heads,
    num_blocks,
    parts_each,  # of a program
    WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEYS_PER_PART: tl.constexpr,
    TILES: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Probabilities of some parts of the keys, reduced over window rows and query heads."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_kv_heads, i_seq % num_kv_heads
    group = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    length = num_blocks * PAGE_TOKENS
    p_mean, p_last = mean_ptr + i_seq * length, last_ptr + i_seq * length
    divisor = 1 if TAKE_MAX else group
    first = tl.program_id(1) * parts_each * KEYS_PER_PART
    end = tl.minimum(length, first + parts_each * KEYS_PER_PART)
    scored = tl.maximum(tl.minimum(end, prompt_len - WINDOW) - first, 0)
    for i_tile in range(TILES):
        if TILES > 1:
            tl.debug_barrier()  # what the tile before has written is read below
        o_head, o_w, m_r = _tile_rows(i_tile, group, WINDOW, PADDED, BLOCK_R)
        b_q = query_rows.load_rows(
            q_ptr, i_row, o_w, i_head * group + o_head, m_r, WINDOW, num_q_heads, HEAD_SIZE, BLOCK_D
        )
        p_lse = lse_ptr + (i_seq * TILES + i_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        # rows that do not exist add nothing
        b_lse = tl.load(p_lse, mask=m_r, other=float("inf"))
        # every row sees every key that is scored
        for start in range(first, first + scored, BLOCK_T):
            o_key = start + tl.arange(0, BLOCK_T)
            b_z = _logits(
                b_q, pages_ptr, table_ptr, i_row, i_head, o_key, o_w, prompt_len, scale, softcap,
                num_kv_heads, num_blocks, WINDOW, HEAD_SIZE, PAGE_TOKENS, BLOCK_D, HAS_SOFTCAP,
                EXACT, False,
            )  # fmt: skip
            b_p = tl.exp2(b_z - b_lse[:, None])
            b_mean, b_last = _reduced(b_p, o_w, WINDOW, PADDED, BLOCK_R, BLOCK_T, TAKE_MAX)
            b_mean, b_last = b_mean / (WINDOW * divisor), b_last / divisor
            m_out = o_key < prompt_len - WINDOW
            if TILES > 1:
                m_old = m_out & (i_tile > 0)
                b_old = tl.load(p_mean + o_key, mask=m_old, other=0.0)
                b_before = tl.load(p_last + o_key, mask=m_old, other=0.0)
                if TAKE_MAX:
                    b_mean, b_last = tl.maximum(b_mean, b_old), tl.maximum(b_last, b_before)
                else:
                    b_mean, b_last = b_mean + b_old, b_last + b_before
            tl.store(p_mean + o_key, b_mean, mask=m_out)
            tl.store(p_last + o_key, b_last, mask=m_out)
    b_zero = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(first + scored, end, BLOCK_T):
        o_key = start + tl.arange(0, BLOCK_T)
        tl.store(p_mean + o_key, b_zero, mask=o_key < end)
        tl.store(p_last + o_key, b_zero, mask=o_key < end)


def window_scores(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.window_scores``; keys are read through the block table, twice.

    Args:
        queries: [R, W, Hq, D].
        prompts: with token-row pages.

    Returns:
        Mean over the window and last row, each [R, Hkv, B * block_size] float32.
    """
    layout, num_kv_heads = prompts.layout, prompts.num_kv_heads
    num, window, num_q_heads, head_size = queries.shape
    num_blocks = prompts.block_table.shape[1]
    length, sequences = num_blocks * layout.block_size, num * num_kv_heads
    exact = queries.dtype == torch.float32
    padded = triton.next_power_of_2(window)
    heads = triton.next_power_of_2(num_q_heads // num_kv_heads)
    take_max = reduction == "max"
    # larger products in float32, and larger maxima, would spill registers
    most = 32 if exact else 128 if take_max else 256
    rows = max(16, padded, min(heads * padded, most))
    tiles = triton.cdiv(num_q_heads // num_kv_heads, rows // padded)
    inputs = (
        queries.contiguous(),
        prompts.pages,
        prompts.block_table.contiguous(),
        prompt_lens.contiguous(),
        scale,
        prompts.key_scale,
    )
    numbers = (softcap, num_q_heads, num_kv_heads, num_blocks)
    sizes = {
        "WINDOW": window,
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": layout.block_size,
        "PADDED": padded,
        "BLOCK_R": rows,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_T": 32 if exact else 64,
        "KEYS_PER_PART": splits.KEYS_PER_PART,
        "HAS_SOFTCAP": softcap != 0,
        "EXACT": exact,
        "num_warps": 16 if exact else 8 if rows > 64 or prompts.pages.element_size() == 1 else 4,
    }
    each = splits.parts_per_split(sequences, length, queries.device)
    partial = splits.new_partial(sequences, length, tiles * rows, queries.device)
    num_splits = triton.cdiv(partial.shape[2], each)
    _row_sums_kernel[(sequences, num_splits, tiles)](
        *inputs, partial[0], partial[1], *numbers, partial.shape[2], each, **sizes
    )
    lse = splits.combine(partial, prompt_lens, base_2=True)

    scores = queries.new_empty((2, num, num_kv_heads, length), dtype=torch.float32)
    _scores_kernel[(sequences, num_splits)](
        *inputs, lse, scores[0], scores[1], *numbers, each,
        TILES=tiles, TAKE_MAX=take_max, **sizes,
    )  # fmt: skip
    return scores[0], scores[1]
