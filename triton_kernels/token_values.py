# SPDX-License-Identifier: Apache-2.0
"""What BACON adds to the scores of tokens, and how strongly: shared by its kernels."""

import triton
import triton.language as tl

UNSPECIALIZED = ["num_prompts", "first_layer", "reach", "num_images"]
"""Arguments whose values shall not lead to kernels of their own."""


@triton.jit
def image_lines(segment_ptr, lines_ptr, i_row, o_t, m_t, length, num_images):
    """First position, end, width and step of the images of tokens ``o_t``, int32; 0 on text."""
    b_image = tl.load(segment_ptr + i_row * length + o_t, mask=m_t, other=-1)
    m_image = b_image >= 0
    p_line = lines_ptr + (i_row * num_images + b_image) * 4
    b_first = tl.load(p_line, mask=m_image, other=0).to(tl.int32)
    b_end = tl.load(p_line + 1, mask=m_image, other=0).to(tl.int32)
    b_width = tl.load(p_line + 2, mask=m_image, other=0).to(tl.int32)
    b_step = tl.load(p_line + 3, mask=m_image, other=0).to(tl.int32)
    return b_first, b_end, b_width, b_step


@triton.jit
def pooled(
    p_row,
    o_t,
    num_candidates,
    segment_ptr,  # [R, T] int64, or None
    lines_ptr,  # [R, M, 4] int64, or None
    i_row,
    length,
    num_images,
    KERNEL: tl.constexpr,
    TAKE_MAX: tl.constexpr,
):
    """Pooled scores at positions ``o_t``, 0 outside [0, num_candidates)."""
    b_first = tl.zeros(o_t.shape, tl.int32)
    b_end = b_first + num_candidates
    b_step = b_first + 1
    if segment_ptr is not None:
        m_t = (o_t >= 0) & (o_t < num_candidates)
        first, end, _, step = image_lines(
            segment_ptr, lines_ptr, i_row, o_t, m_t, length, num_images
        )
        b_first = tl.where(step > 0, first, b_first)
        b_end = tl.where(step > 0, tl.minimum(end, num_candidates), b_end)
        b_step = tl.where(step > 0, step, b_step)
    b_pool = tl.full(o_t.shape, float("-inf") if TAKE_MAX else 0.0, tl.float32)
    for tap in range(KERNEL):
        o_near = o_t + (tap - KERNEL // 2) * b_step
        m_near = (o_near >= b_first) & (o_near < b_end)
        if TAKE_MAX:
            b_x = tl.load(p_row + o_near, mask=m_near, other=float("-inf"))
            b_pool = tl.maximum(b_pool, b_x)
        else:
            b_pool += tl.load(p_row + o_near, mask=m_near, other=0.0)
    if not TAKE_MAX:
        b_pool = b_pool / KERNEL
    return tl.where((o_t >= 0) & (o_t < num_candidates), b_pool, 0.0)


@triton.jit
def _persistence(
    trace_ptr,
    i_row,
    i_head,
    o_t,
    m_t,
    layer_stride,
    prompt_stride,
    head_stride,
    num_prompts,
    first_layer,
    reach,
    ATTENUATED: tl.constexpr,
):
    """What the layers before a row's own agree on, 0 where there is none."""
    layer = first_layer + i_row.to(tl.int32) // num_prompts
    first = tl.maximum(layer - reach, 0)
    p_trace = trace_ptr + i_row % num_prompts * prompt_stride + i_head * head_stride + o_t
    count = tl.maximum(layer - first, 1).to(tl.float32)
    b_mean = tl.zeros(o_t.shape, tl.float32)
    for old in range(first, layer):
        b_mean += tl.load(p_trace + tl.cast(old, tl.int64) * layer_stride, mask=m_t, other=0.0)
    b_mean = b_mean / count
    if ATTENUATED:
        b_square = tl.zeros(o_t.shape, tl.float32)
        for old in range(first, layer):
            b_off = (
                tl.load(p_trace + tl.cast(old, tl.int64) * layer_stride, mask=m_t, other=0.0)
                - b_mean
            )
            b_square += b_off * b_off
        b_mean = tl.maximum(b_mean - tl.sqrt(b_square / count), 0.0)
    return b_mean


@triton.jit
def values(
    base_ptr,
    evidence_ptr,
    trace_ptr,
    i_seq,
    o_t,
    num_candidates,
    num_heads,
    length,
    layer_stride,
    prompt_stride,
    head_stride,
    num_prompts,
    first_layer,
    reach,
    segment_ptr,
    lines_ptr,
    num_images,
    MODE: tl.constexpr,
    LOCAL_K: tl.constexpr,
    EPS: tl.constexpr,
):
    """What is added to the base score, V, at positions ``o_t``."""
    p_base, p_evidence = base_ptr + i_seq * length, evidence_ptr + i_seq * length
    m_t = o_t < num_candidates
    b_value = tl.load(p_evidence + o_t, mask=m_t, other=0.0)
    if MODE != "e":
        i_row = i_seq // num_heads
        b_coherence = pooled(
            p_evidence, o_t, num_candidates, segment_ptr, lines_ptr, i_row, length, num_images,
            LOCAL_K, False,
        )  # fmt: skip
        if MODE == "rel":
            b_base = tl.load(p_base + o_t, mask=m_t, other=0.0)
            b_nearby = pooled(
                p_base, o_t, num_candidates, segment_ptr, lines_ptr, i_row, length, num_images,
                LOCAL_K, False,
            )  # fmt: skip
            b_coherence = b_coherence * b_nearby / (b_nearby + b_base + EPS)
        b_value += b_coherence
    if MODE == "elt" or MODE == "rel":
        b_value += _persistence(
            trace_ptr, i_seq // num_heads, i_seq % num_heads, o_t, m_t, layer_stride,
            prompt_stride, head_stride, num_prompts, first_layer, reach, MODE == "rel",
        )  # fmt: skip
    return b_value


@triton.jit
def limits(num_candidates_ptr, capacity_ptr, i_row, TOPK_FRAC: tl.constexpr):
    """Scored tokens of a row, and how many of them its statistics are taken of: int32."""
    num_candidates = tl.load(num_candidates_ptr + i_row).to(tl.int32)
    wanted = (tl.load(capacity_ptr + i_row).to(tl.float64) * TOPK_FRAC).to(tl.int64)
    return num_candidates, tl.minimum(tl.maximum(wanted, 1), num_candidates).to(tl.int32)


@triton.jit
def strength(
    base_mean, base_std, value_mean, value_std, lambda_c, GATED: tl.constexpr, EPS: tl.constexpr
):
    strength = lambda_c * base_std / (value_std + EPS)
    if GATED:
        strength = strength * tl.minimum(tl.maximum(value_mean / (base_mean + EPS), 0.0), 1.0)
    return strength
