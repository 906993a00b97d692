# SPDX-License-Identifier: Apache-2.0
"""Statistics of the attention on visual tokens, in double precision: one program per row."""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels.reference_rows import EQUAL_UP_TO


@triton.jit
def _visual_tile(values_ptr, segment_ptr, i_row, length, prompt_len, start, BLOCK: tl.constexpr):
    """Values of one tile in float64, and which of them belong to visual tokens."""
    o_t = start + tl.arange(0, BLOCK)
    offset, inside = i_row * length + o_t, o_t < prompt_len
    visual = tl.load(segment_ptr + offset, mask=inside, other=-1) >= 0
    return tl.load(values_ptr + offset, mask=visual, other=0.0).to(tl.float64), visual


@triton.jit
def _skewness_kernel(
    values_ptr,  # [R, T] float32
    segment_ptr,  # [R, T] int64
    prompt_lens_ptr,  # [R] int64
    moments_ptr,  # [R, 2] float64
    length,  # T
    EQUAL_UP_TO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    prompt_len = tl.load(prompt_lens_ptr + i_row).to(tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, prompt_len, BLOCK):
        b_x, visual = _visual_tile(values_ptr, segment_ptr, i_row, length, prompt_len, start, BLOCK)
        count += visual.to(tl.int32)
        total += b_x
    num = tl.sum(count, 0).to(tl.float64)
    strength = tl.sum(total, 0)
    mean = strength / tl.maximum(num, 1.0)
    squares = tl.zeros((BLOCK,), tl.float64)
    cubes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, prompt_len, BLOCK):
        b_x, visual = _visual_tile(values_ptr, segment_ptr, i_row, length, prompt_len, start, BLOCK)
        b_x = tl.where(visual, b_x - mean, 0.0)
        squares += b_x * b_x
        cubes += b_x * b_x * b_x
    few = num < 3.0
    num = tl.where(few, 3.0, num)
    deviation = tl.sqrt(tl.sum(squares, 0) / (num - 1.0))
    differ = deviation > EQUAL_UP_TO * mean
    divisor = tl.where(differ, deviation * deviation * deviation, 1.0)
    skewness = num / ((num - 1.0) * (num - 2.0)) * (tl.sum(cubes, 0) / divisor)
    skewness = tl.where(differ, tl.maximum(skewness, 0.0), 0.0)
    tl.store(moments_ptr + 2 * i_row, tl.where(few, 1.0, strength))
    tl.store(moments_ptr + 2 * i_row + 1, tl.where(few, 0.0, skewness))


def strength_and_skewness(
    importance: torch.Tensor, segment: torch.Tensor, prompt_lens: torch.Tensor
) -> torch.Tensor:
    """See ``reference.strength_and_skewness``."""
    num, length = importance.shape
    moments = importance.new_empty((num, 2), dtype=torch.float64)
    _skewness_kernel[(num,)](
        importance.contiguous(),
        segment.contiguous(),
        prompt_lens.contiguous(),
        moments,
        length,
        EQUAL_UP_TO=EQUAL_UP_TO,
        BLOCK=1024,
        num_warps=8,
    )
    return moments
