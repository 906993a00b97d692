# SPDX-License-Identifier: Apache-2.0
"""What the elite of an instruction looks at: keys are read twice, and only those that count.

Each program finds the elite rows of its query head itself and gathers them into tiles of 16: by
default an elite is a handful of up to 256 rows, and the work follows its size.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows, splits
from vllm_kvcompress.kernels.reference import PromptPages

_TILE = {"BLOCK_R": 16, "BLOCK_T": 64}


@triton.jit
def _last_logits_kernel(
    q_ptr,  # [R, Q, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    instruction_len_ptr,  # [R] int64
    logits_ptr,  # [R, Hq, Q] float32
    softcap,
    num_rows,  # Q
    num_q_heads,
    num_kv_heads,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Logits of the last row on one tile of the instruction."""
    i_row = tl.program_id(0).to(tl.int64) // num_q_heads
    i_qhead = tl.program_id(0) % num_q_heads
    i_head = i_qhead // (num_q_heads // num_kv_heads)
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    o_i = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    instruction_len = tl.load(instruction_len_ptr + i_row).to(tl.int32)
    m_key = (o_i >= num_rows - instruction_len) & (o_i < num_rows)
    o_key = tl.load(prompt_lens_ptr + i_row).to(tl.int32) - num_rows + o_i
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
        PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r == 0  # a matrix product wants more rows than there are
    b_q = query_rows.load_rows(
        q_ptr, i_row, num_rows - 1 + o_r, i_qhead, m_r, num_rows, num_q_heads, HEAD_SIZE, BLOCK_D
    )
    b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
    b_z = tl.sum(tl.where(m_r[:, None], b_z, 0.0), 0)
    p_logits = logits_ptr + (i_row * num_q_heads + i_qhead) * num_rows + o_i
    tl.store(p_logits, tl.where(m_key, b_z, float("-inf")), mask=o_i < num_rows)


@triton.jit
def _count_elite(elite_ptr, i_seq, num_rows, BLOCK_I: tl.constexpr):
    o_i = tl.arange(0, BLOCK_I)
    b_elite = tl.load(elite_ptr + i_seq * num_rows + o_i, mask=o_i < num_rows, other=0)
    return tl.sum(b_elite.to(tl.int32), 0)


@triton.jit
def _gather_elite(elite_ptr, i_seq, o_r, num_rows, BLOCK_I: tl.constexpr):
    """Rows [BLOCK_R] that are the elite's number ``o_r``; 0 beyond the last."""
    o_i = tl.arange(0, BLOCK_I)
    b_elite = tl.load(elite_ptr + i_seq * num_rows + o_i, mask=o_i < num_rows, other=0)
    number = tl.cumsum(b_elite.to(tl.int32), 0) - 1
    match = (b_elite != 0)[None, :] & (number[None, :] == o_r[:, None])
    return tl.sum(tl.where(match, o_i[None, :], 0), 1)


@triton.jit(do_not_specialize=["num_blocks", "num_parts", "parts_each"])
def _elite_sums_kernel(
    q_ptr,  # [R, Q, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    elite_ptr,  # [R, Hq, Q] uint8
    segment_ptr,  # [R, T] int64
    max_ptr,  # [R, Hq, parts, Q] float32, by number in the elite
    sum_ptr,  # [R, Hq, parts, Q] float32
    softcap,
    num_rows,  # Q
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_parts,
    parts_each,  # of a program
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEYS_PER_PART: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Maximum and sum of exponentials of each elite row, over some parts of the keys."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row = i_seq // num_q_heads
    i_qhead = tl.program_id(0) % num_q_heads
    i_head = i_qhead // (num_q_heads // num_kv_heads)
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    first = tl.program_id(1) * parts_each * KEYS_PER_PART
    end = tl.minimum(prompt_len, first + parts_each * KEYS_PER_PART)
    p_segment = segment_ptr + i_row * num_blocks * PAGE_TOKENS
    p_elite = elite_ptr + i_seq * num_rows
    count = _count_elite(elite_ptr, i_seq, num_rows, BLOCK_I)
    for start_row in range(0, count, BLOCK_R):
        o_r = start_row + tl.arange(0, BLOCK_R)
        m_r = o_r < count
        o_row = _gather_elite(elite_ptr, i_seq, o_r, num_rows, BLOCK_I)
        b_q = query_rows.load_rows(
            q_ptr, i_row, o_row, i_qhead, m_r, num_rows, num_q_heads, HEAD_SIZE, BLOCK_D
        )
        b_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(first, end, BLOCK_T):
            o_key = start + tl.arange(0, BLOCK_T)
            o_i = o_key - (prompt_len - num_rows)
            b_text = tl.load(p_elite + o_i, mask=(o_i >= 0) & (o_i < num_rows), other=0) != 0
            m_key = (tl.load(p_segment + o_key, mask=o_key < end, other=-1) >= 0) | b_text
            m_key &= o_key < end
            # keys that no row may see are not even read
            b_k = paged_keys.load_keys(
                pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks,
                HEAD_SIZE, PAGE_TOKENS, BLOCK_D,
            )  # fmt: skip
            b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
            sees = m_key[None, :] & (o_i[None, :] <= o_row[:, None])
            b_z = tl.where(sees, b_z, float("-inf"))
            b_max, b_sum = query_rows.add_tile(b_max, b_sum, b_z)
            # a part ends: no branch, which would keep loads of the next tile from being early
            ends = ((start + BLOCK_T) % KEYS_PER_PART == 0) | (start + BLOCK_T >= end)
            offset = (i_seq * num_parts + start // KEYS_PER_PART) * num_rows + o_r
            tl.store(max_ptr + offset, b_max, mask=m_r & ends)
            tl.store(sum_ptr + offset, b_sum, mask=m_r & ends)
            b_max = tl.where(ends, float("-inf"), b_max)
            b_sum = tl.where(ends, 0.0, b_sum)


@triton.jit
def _elite_attention_kernel(
    q_ptr,  # [R, Q, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    elite_ptr,  # [R, Hq, Q] uint8
    segment_ptr,  # [R, T] int64
    lse_ptr,  # [R, Hq, Q] float32, by number in the elite
    mean_ptr,  # [R, Hq, T] float32
    softcap,
    num_rows,  # Q
    num_q_heads,
    num_kv_heads,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Probabilities of the visual tokens in one tile of keys, mean over the elite rows."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row = i_seq // num_q_heads
    i_qhead = tl.program_id(0) % num_q_heads
    i_head = i_qhead // (num_q_heads // num_kv_heads)
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    length = num_blocks * PAGE_TOKENS
    o_key = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_key = tl.load(segment_ptr + i_row * length + o_key, mask=o_key < prompt_len, other=-1) >= 0
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
        PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    b_sum = tl.zeros((BLOCK_T,), tl.float32)
    count = _count_elite(elite_ptr, i_seq, num_rows, BLOCK_I)
    for start_row in range(0, count, BLOCK_R):
        o_r = start_row + tl.arange(0, BLOCK_R)
        m_r = o_r < count
        o_row = _gather_elite(elite_ptr, i_seq, o_r, num_rows, BLOCK_I)
        b_q = query_rows.load_rows(
            q_ptr, i_row, o_row, i_qhead, m_r, num_rows, num_q_heads, HEAD_SIZE, BLOCK_D
        )
        b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
        sees = o_key[None, :] <= (prompt_len - num_rows + o_row)[:, None]
        # rows that do not exist add nothing
        b_lse = tl.load(lse_ptr + i_seq * num_rows + o_r, mask=m_r, other=float("inf"))
        b_sum += tl.sum(tl.exp(tl.where(sees, b_z, float("-inf")) - b_lse[:, None]), 0)
    b_mean = tl.where(m_key, b_sum / count.to(tl.float32), 0.0)
    tl.store(mean_ptr + i_seq * length + o_key, b_mean, mask=o_key < length)


def last_row_logits(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.last_row_logits``; keys are read through the block table.

    Args:
        queries: [R, Q, Hq, D].
        prompts: with token-row pages.

    Returns:
        [R, Hq, Q] float32.
    """
    num, num_rows, num_q_heads, _ = queries.shape
    inputs, numbers, sizes = query_rows.arguments(
        queries, prompts, prompt_lens, scale, softcap, _TILE
    )
    logits = queries.new_empty((num, num_q_heads, num_rows), dtype=torch.float32)
    _last_logits_kernel[(num * num_q_heads, triton.cdiv(num_rows, _TILE["BLOCK_T"]))](
        *inputs, instruction_len.contiguous(), logits, *numbers, **sizes
    )
    return logits


def elite_attention(
    queries: torch.Tensor,
    elite: torch.Tensor,
    segment: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.elite_attention``; keys are read through the block table.

    Args:
        queries: [R, Q, Hq, D].
        segment: [R, B * block_size] int64.
        prompts: with token-row pages.

    Returns:
        [R, Hq, B * block_size] float32.
    """
    num, num_rows, num_q_heads, _ = queries.shape
    length = prompts.block_table.shape[1] * prompts.layout.block_size
    inputs, numbers, sizes = query_rows.arguments(
        queries, prompts, prompt_lens, scale, softcap, _TILE
    )
    inputs += (elite.contiguous().view(torch.uint8), segment.contiguous())
    sizes["BLOCK_I"] = max(16, triton.next_power_of_2(num_rows))

    sequences = num * num_q_heads
    each = splits.parts_per_split(sequences, length, queries.device)
    partial = splits.new_partial(sequences, length, num_rows, queries.device)
    _elite_sums_kernel[(sequences, triton.cdiv(partial.shape[2], each))](
        *inputs, partial[0], partial[1], *numbers, partial.shape[2], each,
        KEYS_PER_PART=splits.KEYS_PER_PART, **sizes,
    )  # fmt: skip
    lse = splits.combine(partial, prompt_lens)

    mean = queries.new_empty((num, num_q_heads, length), dtype=torch.float32)
    _elite_attention_kernel[(num * num_q_heads, triton.cdiv(length, _TILE["BLOCK_T"]))](
        *inputs, lse, mean, *numbers, **sizes
    )
    return mean
