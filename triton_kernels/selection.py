# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of every head by radix selection: scores are read five times, nothing is sorted."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix


@triton.jit
def _select_kernel(
    scores_ptr,  # [N * H, T] float32
    count_ptr,  # [N * H] int64
    candidates_ptr,  # [N] int64
    pinned_end_ptr,  # [N] int64
    kept_ptr,  # [N * H, width] int64
    num_heads,
    length,  # T
    width,
    BLOCK: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    i_row = i_seq // num_heads
    count = tl.load(count_ptr + i_seq).to(tl.int32)
    candidates = tl.load(candidates_ptr + i_row).to(tl.int32)
    pinned_end = tl.maximum(tl.load(pinned_end_ptr + i_row).to(tl.int32), candidates)
    p_row = scores_ptr + i_seq * length
    p_kept = kept_ptr + i_seq * width
    o_block = tl.arange(0, BLOCK)

    free = tl.maximum(count - (pinned_end - candidates), 0)
    last_key, rest = radix.threshold(p_row, candidates, free, BLOCK)
    num_kept = tl.full((), 0, tl.int32)
    num_ties = tl.full((), 0, tl.int32)
    for start in range(0, pinned_end, BLOCK):
        o_t = start + o_block
        m_t = o_t < candidates
        key = radix.order_keys(tl.load(p_row + o_t, mask=m_t, other=0.0))
        tied = (m_t & (key == last_key)).to(tl.int32)
        among_ties = num_ties + tl.cumsum(tied, 0)  # 1 for the first of them
        keep = m_t & ((key > last_key) | ((tied != 0) & (among_ties <= rest)))
        keep = (keep | ((o_t >= candidates) & (o_t < pinned_end))).to(tl.int32)
        target = num_kept + tl.cumsum(keep, 0) - 1
        tl.store(p_kept + target, o_t.to(tl.int64), mask=(keep != 0) & (target < count))
        num_kept += tl.sum(keep, 0)
        num_ties += tl.sum(tied, 0)
    for start in range(0, width, BLOCK):
        o_k = start + o_block
        tl.store(p_kept + o_k, length.to(tl.int64), mask=(o_k >= count) & (o_k < width))


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    num_candidates: torch.Tensor,
    pinned_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """See ``reference.select_tokens``; one program per head."""
    num, num_heads, length = scores.shape
    width = min(max_count, length)
    kept = torch.empty((num, num_heads, width), dtype=torch.int64, device=scores.device)
    _select_kernel[(num * num_heads,)](
        scores.contiguous(),
        count.contiguous(),
        num_candidates.contiguous(),
        pinned_end.contiguous(),
        kept,
        num_heads,
        length,
        width,
        BLOCK=radix.BLOCK,
        num_warps=radix.NUM_WARPS,
    )
    return kept
