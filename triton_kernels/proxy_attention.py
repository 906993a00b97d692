# SPDX-License-Identifier: Apache-2.0
"""What groups of proxies look at: QK^T twice, nothing of size M x T is stored.

The proxies of all query heads of a KV head are rows of one matrix, so that tiles of rows are full
whatever the numbers of query heads and of proxies per group.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import paged_keys, query_rows, splits
from vllm_kvcompress.kernels.reference import PromptPages

_GROUPS_PER_PROGRAM = 4
"""Groups that look at a tile of keys while it is on the chip."""


@triton.jit(do_not_specialize=["num_blocks", "num_parts", "parts_each"])
def _proxy_sums_kernel(
    q_ptr,  # [R, M, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    max_ptr,  # [R, Hkv, parts, G * M] float32
    sum_ptr,  # [R, Hkv, parts, G * M] float32
    softcap,
    num_rows,  # M
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_parts,
    parts_each,  # of a program
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEYS_PER_PART: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Maximum and sum of exponentials of a tile of proxies, over some parts of the keys."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_seq // num_kv_heads, i_seq % num_kv_heads
    group = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < group * num_rows
    b_q = query_rows.load_rows(
        q_ptr, i_row, o_r % num_rows, i_head * group + o_r // num_rows, m_r, num_rows, num_q_heads,
        HEAD_SIZE, BLOCK_D,
    )  # fmt: skip
    b_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    first = tl.program_id(2) * parts_each * KEYS_PER_PART
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    end = tl.minimum(prompt_len, first + parts_each * KEYS_PER_PART)
    for start in range(first, end, BLOCK_T):
        o_key = start + tl.arange(0, BLOCK_T)
        m_key = o_key < end
        b_k = paged_keys.load_keys(
            pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
            PAGE_TOKENS, BLOCK_D,
        )  # fmt: skip
        b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
        b_z = tl.where(m_key[None, :], b_z, float("-inf"))
        b_max, b_sum = query_rows.add_tile(b_max, b_sum, b_z)
        # a part ends: no branch, which would keep loads of the next tile from being early
        ends = ((start + BLOCK_T) % KEYS_PER_PART == 0) | (start + BLOCK_T >= end)
        offset = (i_seq * num_parts + start // KEYS_PER_PART) * group * num_rows + o_r
        tl.store(max_ptr + offset, b_max, mask=m_r & ends)
        tl.store(sum_ptr + offset, b_sum, mask=m_r & ends)
        b_max = tl.where(ends, float("-inf"), b_max)
        b_sum = tl.where(ends, 0.0, b_sum)


@triton.jit
def _group_attention_sum_kernel(
    q_ptr,  # [R, M, Hq, D]
    pages_ptr,  # [num_pages, block_size * 2 * D]
    table_ptr,  # [R, B] int64
    prompt_lens_ptr,  # [R] int64
    scale_ptr,  # [R] float32
    key_scale_ptr,  # [R] float32, or None
    lse_ptr,  # [R, Hkv, G * M] float32
    masses_ptr,  # [R, Hkv, NG, T] float32
    softcap,
    num_rows,  # M
    num_q_heads,
    num_kv_heads,
    num_blocks,
    num_groups,  # NG
    HEAD_SIZE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS_PER_PROGRAM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Probabilities of one tile of keys, summed over the proxies of each of a few groups."""
    i_row = tl.program_id(0).to(tl.int64) // num_kv_heads
    i_head = tl.program_id(0) % num_kv_heads
    heads = num_q_heads // num_kv_heads
    scale = paged_keys.row_scale(scale_ptr, key_scale_ptr, i_row)
    o_key = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_key = o_key < tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    b_k = paged_keys.load_keys(
        pages_ptr, table_ptr, i_row, i_head, o_key, m_key, num_kv_heads, num_blocks, HEAD_SIZE,
        PAGE_TOKENS, BLOCK_D,
    )  # fmt: skip
    size = num_rows // num_groups
    length = num_blocks * PAGE_TOKENS
    i_seq = i_row * num_kv_heads + i_head
    first = tl.program_id(2) * GROUPS_PER_PROGRAM
    for i_group in range(first, tl.minimum(first + GROUPS_PER_PROGRAM, num_groups)):
        b_mass = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, heads * size, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            m_r = o_r < heads * size
            o_proxy, o_head = i_group * size + o_r % size, o_r // size
            b_q = query_rows.load_rows(
                q_ptr, i_row, o_proxy, i_head * heads + o_head, m_r, num_rows, num_q_heads,
                HEAD_SIZE, BLOCK_D,
            )  # fmt: skip
            b_z = paged_keys.logits(b_q, b_k, scale, softcap, HAS_SOFTCAP, EXACT)
            p_lse = lse_ptr + i_seq * heads * num_rows + o_head * num_rows + o_proxy
            # rows that do not exist add nothing
            b_lse = tl.load(p_lse, mask=m_r, other=float("inf"))
            b_mass += tl.sum(tl.exp(b_z - b_lse[:, None]), 0)
        p_mass = masses_ptr + (i_seq * num_groups + i_group) * length + o_key
        tl.store(p_mass, tl.where(m_key, b_mass / heads, 0.0), mask=o_key < length)


def group_attention_sum(
    queries: torch.Tensor,
    prompts: PromptPages,
    prompt_lens: torch.Tensor,
    num_groups: int,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """See ``reference.group_attention_sum``; keys are read through the block table.

    Args:
        queries: [R, M, Hq, D]; in the model's type, not in float32, tensor cores multiply them.
        prompts: with token-row pages.

    Returns:
        [R, Hkv, NG, B * block_size] float32.
    """
    pages, block_table, num_kv_heads, layout = prompts[:4]
    num, num_rows, num_q_heads, head_size = queries.shape
    num_blocks = block_table.shape[1]
    length = num_blocks * layout.block_size
    inputs = (
        queries.contiguous(),
        pages,
        block_table.contiguous(),
        prompt_lens.contiguous(),
        scale,
        prompts.key_scale,
    )
    numbers = (softcap, num_rows, num_q_heads, num_kv_heads, num_blocks)
    exact = queries.dtype == torch.float32  # small tiles, whose products do not spill registers
    most = 32 if exact else 64
    sizes = {
        "HEAD_SIZE": head_size,
        "PAGE_TOKENS": layout.block_size,
        "BLOCK_D": max(16, triton.next_power_of_2(head_size)),
        "HAS_SOFTCAP": softcap != 0,
        "EXACT": exact,
    }

    rows = num_q_heads // num_kv_heads * num_rows
    block, sequences = _tile(rows, most), num * num_kv_heads
    tiles = triton.cdiv(rows, block)
    each = splits.parts_per_split(sequences * tiles, length, queries.device)
    partial = splits.new_partial(sequences, length, rows, queries.device)
    _proxy_sums_kernel[(sequences, tiles, triton.cdiv(partial.shape[2], each))](
        *inputs, partial[0], partial[1], *numbers, partial.shape[2], each,
        BLOCK_R=block, BLOCK_T=most, KEYS_PER_PART=splits.KEYS_PER_PART,
        num_warps=8 if exact else 4, **sizes,
    )  # fmt: skip
    lse = splits.combine(partial, prompt_lens)

    masses = pages.new_empty((num, num_kv_heads, num_groups, length), dtype=torch.float32)
    # wide tiles, because every tile of keys reads all proxies
    width = 32 if exact else 128
    keys, groups = triton.cdiv(length, width), triton.cdiv(num_groups, _GROUPS_PER_PROGRAM)
    _group_attention_sum_kernel[(num * num_kv_heads, keys, groups)](
        *inputs, lse, masses, *numbers, num_groups,
        BLOCK_R=_tile(rows // num_groups, most), BLOCK_T=width,
        GROUPS_PER_PROGRAM=_GROUPS_PER_PROGRAM, num_warps=8, **sizes,
    )  # fmt: skip
    return masses


def _tile(rows: int, most: int) -> int:
    """Rows of a matrix product that has so many."""
    return min(most, max(16, triton.next_power_of_2(rows)))
