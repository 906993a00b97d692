# SPDX-License-Identifier: Apache-2.0
"""What scores know of images, and window scores that are raised and weighed."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference_grid import TINY, Grids

_TOKENS_AT_ONCE = 512
_LARGEST_TILE = 2048


@triton.jit(do_not_specialize=["num_images"])
def _balance_kernel(
    scores_ptr,  # [R * H, T] float32
    num_candidates_ptr,  # [R] int64
    lines_ptr,  # [R, M, 4] int64
    balance_ptr,  # [R * H, M] float32
    num_heads,
    length,  # T
    num_images,  # M
    BLOCK_T: tl.constexpr,
):
    """One head and image: neighbours in its rows against neighbours in its columns."""
    i_seq = tl.program_id(0).to(tl.int64)
    i_image = tl.program_id(1)
    i_row = i_seq // num_heads
    num_candidates = tl.load(num_candidates_ptr + i_row).to(tl.int32)
    p_line = lines_ptr + (i_row * num_images + i_image) * 4
    first, end = tl.load(p_line).to(tl.int32), tl.load(p_line + 1).to(tl.int32)
    width, step = tl.load(p_line + 2).to(tl.int32), tl.load(p_line + 3).to(tl.int32)
    stop = tl.where(step > 0, tl.minimum(end, num_candidates), first)
    p_scores = scores_ptr + i_seq * length
    b_sum = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(first, stop, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        o_column = (o_t - first) % step
        m_t = (o_t < stop) & (o_column < width)
        b_x = tl.load(p_scores + o_t, mask=m_t, other=0.0)
        m_right = m_t & (o_column + 1 < width) & (o_t + 1 < num_candidates)
        b_right = tl.load(p_scores + o_t + 1, mask=m_right, other=0.0)
        b_below = tl.load(p_scores + o_t + step, mask=m_t & (o_t + step < stop), other=0.0)
        b_sum += tl.sqrt(b_x * b_right) - tl.sqrt(b_x * b_below)
    tl.store(balance_ptr + i_seq * num_images + i_image, tl.sum(b_sum, 0))


@triton.jit
def _weigh_kernel(
    base_ptr,  # [R * H, T] float32
    num_candidates_ptr,  # [R] int64
    weight_ptr,  # [R * H, T] float32, or None
    last_ptr,  # [R * H, T] float32, or None
    raised_ptr,  # [R * H, T] float32
    scaled_ptr,  # [R * H, T] float32, or None
    num_heads,
    length,  # T
    TINY: tl.constexpr,
    CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head: its mean, then what is raised to it and weighed, then the last row."""
    i_seq = tl.program_id(0).to(tl.int64)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    at = i_seq * length
    b_sum = tl.zeros((BLOCK,), tl.float32)
    if CLAMP:
        for start in range(0, num_candidates, BLOCK):
            o_t = start + tl.arange(0, BLOCK)
            b_sum += tl.load(base_ptr + at + o_t, mask=o_t < num_candidates, other=0.0)
    level = tl.sum(b_sum, 0) / tl.maximum(num_candidates, 1)
    b_mass = tl.zeros((BLOCK,), tl.float32)
    b_last_mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, length, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        m_t = o_t < num_candidates
        b_x = tl.load(base_ptr + at + o_t, mask=m_t, other=0.0)
        if CLAMP:
            b_x = tl.maximum(b_x, level)
        if weight_ptr is not None:
            b_x *= tl.load(weight_ptr + at + o_t, mask=m_t, other=0.0)
        b_x = tl.where(m_t, b_x, 0.0)
        b_mass += b_x
        tl.store(raised_ptr + at + o_t, b_x, mask=o_t < length)
        if last_ptr is not None:
            b_last_mass += tl.load(last_ptr + at + o_t, mask=m_t, other=0.0)
    if last_ptr is not None:
        factor = tl.sum(b_mass, 0) / tl.maximum(tl.sum(b_last_mass, 0), TINY)
        for start in range(0, length, BLOCK):
            o_t = start + tl.arange(0, BLOCK)
            b_last = tl.load(last_ptr + at + o_t, mask=o_t < num_candidates, other=0.0)
            tl.store(scaled_ptr + at + o_t, b_last * factor, mask=o_t < length)


def grid_balance(scores: torch.Tensor, num_candidates: torch.Tensor, grids: Grids) -> torch.Tensor:
    """See ``reference.grid_balance``."""
    num, num_heads, length = scores.shape
    lines = grids.lines.contiguous()
    num_images = lines.shape[1]
    balance = torch.empty((num, num_heads, num_images), device=scores.device)
    _balance_kernel[(num * num_heads, num_images)](
        scores.contiguous(),
        num_candidates.contiguous(),
        lines,
        balance,
        num_heads,
        length,
        num_images,
        BLOCK_T=_TOKENS_AT_ONCE,
    )
    return balance


def weigh_scores(
    base: torch.Tensor,
    num_candidates: torch.Tensor,
    weight: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    *,
    clamp: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See ``reference.weigh_scores``; one program reads a head two or three times."""
    num, num_heads, length = base.shape
    raised = torch.empty(base.shape, device=base.device)
    scaled = None if last is None else torch.empty(base.shape, device=base.device)
    _weigh_kernel[(num * num_heads,)](
        base.contiguous(),
        num_candidates.contiguous(),
        None if weight is None else weight.contiguous(),
        None if last is None else last.contiguous(),
        raised,
        scaled,
        num_heads,
        length,
        TINY=TINY,
        CLAMP=clamp,
        BLOCK=min(_LARGEST_TILE, triton.next_power_of_2(length)),
        num_warps=8,
    )
    return raised, scaled
