# SPDX-License-Identifier: Apache-2.0
"""BACON's calibration: evidence and values of every token, and one strength per head.

One program holds a head. Longer heads have a program per tile, see ``tiled_calibration.py``.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix, tiled_calibration, tiled_radix, token_values
from vllm_kvcompress.kernels.reference_grid import Grids
from vllm_kvcompress.kernels.reference_scores import EPS

_TOKENS_PER_PROGRAM = 512


@triton.jit(do_not_specialize=["num_images"])
def _pool_kernel(
    scores_ptr,  # [R * H, T] float32
    num_candidates_ptr,  # [R] int64
    pooled_ptr,  # [R * H, T] float32
    segment_ptr,  # [R, T] int64, or None
    lines_ptr,  # [R, M, 4] int64, or None
    num_heads,
    length,  # T
    num_images,  # M
    KERNEL: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    b_pool = token_values.pooled(
        scores_ptr + i_seq * length, o_t, num_candidates, segment_ptr, lines_ptr,
        i_seq // num_heads, length, num_images, KERNEL, TAKE_MAX,
    )  # fmt: skip
    tl.store(pooled_ptr + i_seq * length + o_t, b_pool, mask=o_t < length)


@triton.jit
def _evidence_kernel(
    mean_ptr,  # [R * H, T] float32
    last_ptr,  # [R * H, T] float32
    num_candidates_ptr,  # [R] int64
    base_ptr,  # [R * H, T] float32
    evidence_ptr,  # [R * H, T] float32
    num_heads,
    length,  # T
    KERNEL: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Base score B and evidence E of one tile of tokens."""
    i_seq = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    b_base = token_values.pooled(
        mean_ptr + i_seq * length, o_t, num_candidates, None, None, 0, 0, 0, KERNEL, TAKE_MAX
    )
    b_last = token_values.pooled(
        last_ptr + i_seq * length, o_t, num_candidates, None, None, 0, 0, 0, KERNEL, TAKE_MAX
    )
    offset, m_out = i_seq * length + o_t, o_t < length
    tl.store(evidence_ptr + offset, tl.maximum(b_last - b_base, 0.0), mask=m_out)
    b_base = tl.where(o_t < num_candidates, b_base, float("-inf"))
    tl.store(base_ptr + offset, b_base, mask=m_out)


@triton.jit
def _top_statistics(b_x, m_x, top):
    """Mean and population deviation of the ``top`` largest of the numbers that count."""
    b_key = tl.where(m_x, radix.order_keys(b_x), 0)
    last_key, rest = radix.threshold(b_key, top)
    m_above = b_key > last_key
    tie = radix.value_of(last_key)  # the smallest of the top; so often as is left to take
    mean = (tl.sum(tl.where(m_above, b_x, 0.0), 0) + rest * tie) / top
    b_off = tl.where(m_above, b_x - mean, 0.0)
    square = tl.sum(b_off * b_off, 0) + rest * (tie - mean) * (tie - mean)
    return mean, tl.sqrt(square / top)


@triton.jit(do_not_specialize=token_values.UNSPECIALIZED)
def _value_kernel(
    base_ptr,  # [R * H, T] float32
    evidence_ptr,  # [R * H, T] float32
    trace_ptr,  # [Lt, N, H, T] float32
    num_candidates_ptr,  # [R] int64
    value_ptr,  # [R * H, T] float32
    num_heads,
    length,  # T
    layer_stride,
    prompt_stride,
    head_stride,
    num_prompts,  # N
    first_layer,  # of the rows, in the trace
    reach,
    segment_ptr,  # [R, T] int64, or None
    lines_ptr,  # [R, M, 4] int64, or None
    num_images,  # M
    MODE: tl.constexpr,
    LOCAL_K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    b_value = token_values.values(
        base_ptr, evidence_ptr, trace_ptr, i_seq, o_t, num_candidates, num_heads, length,
        layer_stride, prompt_stride, head_stride, num_prompts, first_layer, reach, segment_ptr,
        lines_ptr, num_images, MODE, LOCAL_K, EPS,
    )  # fmt: skip
    tl.store(value_ptr + i_seq * length + o_t, b_value, mask=o_t < length)


@triton.jit
def _calibrate_kernel(
    base_ptr,  # [R * H, T] float32
    value_ptr,  # [R * H, T] float32; V goes in, S comes out
    num_candidates_ptr,  # [R] int64
    capacity_ptr,  # [R] int64
    num_heads,
    length,  # T
    lambda_c,
    TOPK_FRAC: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """S = B + lambda * V of one head, lambda from the statistics of its largest B and V."""
    i_seq = tl.program_id(0).to(tl.int64)
    num_candidates, top = token_values.limits(
        num_candidates_ptr, capacity_ptr, i_seq // num_heads, TOPK_FRAC
    )
    o_t = tl.arange(0, BLOCK)
    m_t = o_t < num_candidates
    b_base = tl.load(base_ptr + i_seq * length + o_t, mask=m_t, other=0.0)
    b_value = tl.load(value_ptr + i_seq * length + o_t, mask=m_t, other=0.0)
    base_mean, base_std = _top_statistics(b_base, m_t, top)
    value_mean, value_std = _top_statistics(b_value, m_t, top)
    strength = token_values.strength(
        base_mean, base_std, value_mean, value_std, lambda_c, GATED, EPS
    )
    b_final = tl.where(m_t, b_base + strength * b_value, float("-inf"))
    tl.store(value_ptr + i_seq * length + o_t, b_final, mask=o_t < length)


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
    num, num_heads, length = scores.shape
    pooled = torch.empty_like(scores, memory_format=torch.contiguous_format)
    segment, lines, num_images = _images(grids)
    _pool_kernel[(num * num_heads, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        scores.contiguous(),
        num_candidates.contiguous(),
        pooled,
        segment,
        lines,
        num_heads,
        length,
        num_images,
        KERNEL=kernel,
        TAKE_MAX=kind == "max",
        BLOCK_T=_TOKENS_PER_PROGRAM,
    )
    return pooled


def _images(grids: Grids | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Segments, lines, and how many images a row may have."""
    if grids is None:
        return None, None, 0
    return grids.segment.contiguous(), grids.lines.contiguous(), grids.lines.shape[1]


def bacon_evidence(
    mean: torch.Tensor,
    last: torch.Tensor,
    num_candidates: torch.Tensor,
    *,
    kernel: int,
    pool: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``reference.bacon_evidence``."""
    num, num_heads, length = mean.shape
    base, evidence = (torch.empty(mean.shape, device=mean.device) for _ in range(2))
    _evidence_kernel[(num * num_heads, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        mean.contiguous(),
        last.contiguous(),
        num_candidates.contiguous(),
        base,
        evidence,
        num_heads,
        length,
        KERNEL=kernel,
        TAKE_MAX=pool == "max",
        BLOCK_T=_TOKENS_PER_PROGRAM,
    )
    return base, evidence


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
    """See ``reference.bacon_calibrate``.

    Values of all tokens, in tiles, then one program per head. Where heads are long, B and V are
    read six times, in seven launches.
    """
    num, num_heads, length = base.shape
    rows = num * num_heads
    final = torch.empty((num, num_heads, length), dtype=torch.float32, device=base.device)
    if trace.stride(3) != 1:
        trace = trace.contiguous()
    num_layers, num_prompts = trace.shape[:2]
    base = base.contiguous()
    limits = (num_candidates.contiguous(), capacity.contiguous())
    _value_kernel[(rows, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        base,
        evidence.contiguous(),
        trace,
        limits[0],
        final,
        num_heads,
        length,
        *trace.stride()[:3],
        num_prompts,
        num_layers - num // num_prompts,
        trace_r,
        *_images(grids),
        MODE=mode,
        LOCAL_K=local_k,
        EPS=EPS,
        BLOCK_T=_TOKENS_PER_PROGRAM,
    )
    gated = mode == "elt"
    if length > tiled_radix.LONG:
        tiled_calibration.calibrate(base, final, limits, lambda_c, topk_frac, gated)
        return final
    _calibrate_kernel[(rows,)](
        base, final, *limits, num_heads, length, lambda_c,
        TOPK_FRAC=topk_frac, GATED=gated, EPS=EPS, **radix.sizes(length),
    )  # fmt: skip
    return final
