# SPDX-License-Identifier: Apache-2.0
"""BACON's calibration: values of every token, then one strength per head.

The strength takes one program per head, or, where heads are long, one per tile and launch.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix, tiled_radix
from vllm_kvcompress.kernels.reference_scores import EPS

_TOKENS_PER_PROGRAM = 512
_TRACE_STEP = 4


@triton.jit
def _pooled(p_row, o_t, num_candidates, KERNEL: tl.constexpr, TAKE_MAX: tl.constexpr):
    """Pooled scores at positions ``o_t``, 0 outside [0, num_candidates)."""
    b_pool = tl.full(o_t.shape, float("-inf") if TAKE_MAX else 0.0, tl.float32)
    for tap in range(KERNEL):
        o_near = o_t + (tap - KERNEL // 2)
        m_near = (o_near >= 0) & (o_near < num_candidates)
        if TAKE_MAX:
            b_x = tl.load(p_row + o_near, mask=m_near, other=float("-inf"))
            b_pool = tl.maximum(b_pool, b_x)
        else:
            b_pool += tl.load(p_row + o_near, mask=m_near, other=0.0)
    if not TAKE_MAX:
        b_pool = b_pool / KERNEL
    return tl.where((o_t >= 0) & (o_t < num_candidates), b_pool, 0.0)


@triton.jit
def _pool_kernel(
    scores_ptr,  # [N * H, T] float32
    num_candidates_ptr,  # [N] int64
    pooled_ptr,  # [N * H, T] float32
    num_heads,
    length,  # T
    KERNEL: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    i_seq = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    b_pool = _pooled(scores_ptr + i_seq * length, o_t, num_candidates, KERNEL, TAKE_MAX)
    tl.store(pooled_ptr + i_seq * length + o_t, b_pool, mask=o_t < length)


@triton.jit(do_not_specialize=["num_traced"])
def _value_kernel(
    mean_ptr,  # [N * H, T] float32
    last_ptr,  # [N * H, T] float32
    trace_ptrs,  # tuple of [N * H, T] float32, the first num_traced of them count
    num_candidates_ptr,  # [N] int64
    base_ptr,  # [N * H, T] float32
    evidence_ptr,  # [N * H, T] float32
    value_ptr,  # [N * H, T] float32
    num_traced,
    num_heads,
    length,  # T
    KERNEL: tl.constexpr,
    TAKE_MAX: tl.constexpr,
    MODE: tl.constexpr,
    LOCAL_K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Base score B, evidence E and what is added to it, V, of one tile of tokens."""
    i_seq = tl.program_id(0).to(tl.int64)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_candidates = tl.load(num_candidates_ptr + i_seq // num_heads).to(tl.int32)
    p_mean, p_last = mean_ptr + i_seq * length, last_ptr + i_seq * length
    m_t = o_t < num_candidates

    b_base = _pooled(p_mean, o_t, num_candidates, KERNEL, TAKE_MAX)
    b_evidence = tl.maximum(_pooled(p_last, o_t, num_candidates, KERNEL, TAKE_MAX) - b_base, 0.0)
    b_value = b_evidence
    if MODE != "e":
        # neighbours are pooled again rather than waited for: they belong to other programs
        b_coherence = tl.zeros((BLOCK_T,), tl.float32)
        b_nearby = tl.zeros((BLOCK_T,), tl.float32)
        for tap in range(LOCAL_K):
            o_near = o_t + (tap - LOCAL_K // 2)
            b_near = _pooled(p_mean, o_near, num_candidates, KERNEL, TAKE_MAX)
            b_late = _pooled(p_last, o_near, num_candidates, KERNEL, TAKE_MAX)
            b_coherence += tl.maximum(b_late - b_near, 0.0)
            b_nearby += b_near
        b_coherence = b_coherence / LOCAL_K
        if MODE == "rel":
            b_nearby = b_nearby / LOCAL_K
            b_coherence = b_coherence * b_nearby / (b_nearby + b_base + EPS)
        b_value += b_coherence
    if MODE == "elt" or MODE == "rel":
        layers = tl.maximum(num_traced, 1)
        b_lasting = tl.zeros((BLOCK_T,), tl.float32)
        for j in tl.static_range(len(trace_ptrs)):
            if num_traced > j:
                b_lasting += tl.load(trace_ptrs[j] + i_seq * length + o_t, mask=m_t, other=0.0)
        b_lasting = b_lasting / layers
        if MODE == "rel":
            b_square = tl.zeros((BLOCK_T,), tl.float32)
            for j in tl.static_range(len(trace_ptrs)):
                if num_traced > j:
                    b_old = tl.load(trace_ptrs[j] + i_seq * length + o_t, mask=m_t, other=0.0)
                    b_square += (b_old - b_lasting) * (b_old - b_lasting)
            b_lasting = tl.maximum(b_lasting - tl.sqrt(b_square / layers), 0.0)
        b_value += b_lasting

    offset, m_out = i_seq * length + o_t, o_t < length
    tl.store(base_ptr + offset, tl.where(m_t, b_base, float("-inf")), mask=m_out)
    tl.store(evidence_ptr + offset, b_evidence, mask=m_out)
    tl.store(value_ptr + offset, b_value, mask=m_out)


@triton.jit
def _top_statistics(p_row, num_candidates, top, BLOCK: tl.constexpr):
    """Mean and population deviation of the ``top`` largest of row[0:num_candidates)."""
    last_key, rest = radix.threshold(p_row, num_candidates, top, BLOCK)
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK,), tl.float32)
    b_tie = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, num_candidates, BLOCK):
        m_t = start + o_block < num_candidates
        b_x = tl.load(p_row + start + o_block, mask=m_t, other=0.0)
        key = radix.order_keys(b_x)
        b_sum += tl.where(m_t & (key > last_key), b_x, 0.0)
        b_tie = tl.where(m_t & (key == last_key), b_x, b_tie)
    tie = tl.max(b_tie, 0)  # the smallest of the top; so often as is left to take
    mean = (tl.sum(b_sum, 0) + rest * tie) / top
    b_square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_candidates, BLOCK):
        m_t = start + o_block < num_candidates
        b_x = tl.load(p_row + start + o_block, mask=m_t, other=0.0)
        m_t = m_t & (radix.order_keys(b_x) > last_key)
        b_square += tl.where(m_t, (b_x - mean) * (b_x - mean), 0.0)
    square = tl.sum(b_square, 0) + rest * (tie - mean) * (tie - mean)
    return mean, tl.sqrt(square / top)


@triton.jit
def _limits(num_candidates_ptr, capacity_ptr, i_row, TOPK_FRAC: tl.constexpr):
    """Scored tokens of a request, and how many of them its statistics are taken of: int32."""
    num_candidates = tl.load(num_candidates_ptr + i_row).to(tl.int32)
    wanted = (tl.load(capacity_ptr + i_row).to(tl.float64) * TOPK_FRAC).to(tl.int64)
    return num_candidates, tl.minimum(tl.maximum(wanted, 1), num_candidates).to(tl.int32)


@triton.jit
def _strength(
    base_mean, base_std, value_mean, value_std, lambda_c, GATED: tl.constexpr, EPS: tl.constexpr
):
    strength = lambda_c * base_std / (value_std + EPS)
    if GATED:
        strength = strength * tl.minimum(tl.maximum(value_mean / (base_mean + EPS), 0.0), 1.0)
    return strength


@triton.jit
def _add_values(p_base, p_value, o_t, num_candidates, length, strength):
    """S instead of V at positions ``o_t``."""
    m_t = o_t < num_candidates
    b_base = tl.load(p_base + o_t, mask=m_t, other=0.0)
    b_value = tl.load(p_value + o_t, mask=m_t, other=0.0)
    b_final = tl.where(m_t, b_base + strength * b_value, float("-inf"))
    tl.store(p_value + o_t, b_final, mask=o_t < length)


@triton.jit
def _calibrate_kernel(
    base_ptr,  # [N * H, T] float32
    value_ptr,  # [N * H, T] float32; V goes in, S comes out
    num_candidates_ptr,  # [N] int64
    capacity_ptr,  # [N] int64
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
    num_candidates, top = _limits(num_candidates_ptr, capacity_ptr, i_seq // num_heads, TOPK_FRAC)
    p_base, p_value = base_ptr + i_seq * length, value_ptr + i_seq * length
    base_mean, base_std = _top_statistics(p_base, num_candidates, top, BLOCK)
    value_mean, value_std = _top_statistics(p_value, num_candidates, top, BLOCK)
    strength = _strength(base_mean, base_std, value_mean, value_std, lambda_c, GATED, EPS)
    for start in range(0, length, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        _add_values(p_base, p_value, o_t, num_candidates, length, strength)


@triton.jit
def _begin_statistics_kernel(
    num_candidates_ptr,  # [N] int64
    capacity_ptr,  # [N] int64
    scratch_ptr,  # of 2 * N * H rows: B of all heads, then V
    num_heads,
    num_seqs,  # N * H
    TOPK_FRAC: tl.constexpr,
):
    i_part = tl.program_id(0).to(tl.int64)
    i_row = i_part % num_seqs // num_heads
    num_candidates, top = _limits(num_candidates_ptr, capacity_ptr, i_row, TOPK_FRAC)
    tiled_radix.begin(tiled_radix.scratch_row(scratch_ptr, i_part), num_candidates, top)


@triton.jit
def _moments_kernel(
    values_ptr,  # [2 * N * H, T] float32, B and V
    num_candidates_ptr,  # [N] int64
    scratch_ptr,  # of 2 * N * H rows
    moments_ptr,  # [2 * N * H, tiles, 3] float32
    num_heads,
    num_seqs,  # N * H
    length,  # T
    num_tiles,
    BLOCK: tl.constexpr,
):
    """Entries of one tile above the threshold: number, sum, squared distances to their mean."""
    i_part = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    num_candidates = tl.load(num_candidates_ptr + i_part % num_seqs // num_heads).to(tl.int32)
    last_key, _ = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_part))
    o_t = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < num_candidates
    b_x = tl.load(values_ptr + i_part * length + o_t, mask=m_t, other=0.0)
    m_t = m_t & (radix.order_keys(b_x) > last_key)
    number = tl.sum(m_t.to(tl.float32), 0)
    total = tl.sum(tl.where(m_t, b_x, 0.0), 0)
    b_off = tl.where(m_t, b_x - total / tl.maximum(number, 1.0), 0.0)
    p_tile = moments_ptr + (i_part * num_tiles + i_tile) * 3
    tl.store(p_tile, number)
    tl.store(p_tile + 1, total)
    tl.store(p_tile + 2, tl.sum(b_off * b_off, 0))


@triton.jit
def _merged_statistics(moments_ptr, scratch_ptr, i_part, num_tiles, top):
    """See ``_top_statistics``, from the moments of tiles: nothing large is subtracted."""
    last_key, rest = tiled_radix.threshold(tiled_radix.scratch_row(scratch_ptr, i_part))
    tie = radix.value_of(last_key)
    p_moments = moments_ptr + i_part * num_tiles * 3
    total = rest * tie
    for start in range(0, num_tiles, 128):
        o_tile = start + tl.arange(0, 128)
        total += tl.sum(tl.load(p_moments + o_tile * 3 + 1, mask=o_tile < num_tiles, other=0.0), 0)
    mean = total / top
    square = rest * (tie - mean) * (tie - mean)
    for start in range(0, num_tiles, 128):
        o_tile = start + tl.arange(0, 128)
        m_tile = o_tile < num_tiles
        b_number = tl.load(p_moments + o_tile * 3, mask=m_tile, other=0.0)
        b_total = tl.load(p_moments + o_tile * 3 + 1, mask=m_tile, other=0.0)
        b_within = tl.load(p_moments + o_tile * 3 + 2, mask=m_tile, other=0.0)
        b_off = b_total / tl.maximum(b_number, 1.0) - mean
        square += tl.sum(b_within + b_number * b_off * b_off, 0)
    return mean, tl.sqrt(square / top)


@triton.jit
def _add_values_kernel(
    base_ptr,  # [N * H, T] float32
    value_ptr,  # [N * H, T] float32; V goes in, S comes out
    num_candidates_ptr,  # [N] int64
    capacity_ptr,  # [N] int64
    scratch_ptr,  # of 2 * N * H rows
    moments_ptr,  # [2 * N * H, tiles, 3] float32
    num_heads,
    num_seqs,  # N * H
    length,  # T
    num_tiles,
    lambda_c,
    TOPK_FRAC: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of what ``_calibrate_kernel`` does; the strength is the same in all of a head."""
    i_seq = tl.program_id(0).to(tl.int64)
    num_candidates, top = _limits(num_candidates_ptr, capacity_ptr, i_seq // num_heads, TOPK_FRAC)
    base_mean, base_std = _merged_statistics(moments_ptr, scratch_ptr, i_seq, num_tiles, top)
    value_mean, value_std = _merged_statistics(
        moments_ptr, scratch_ptr, num_seqs + i_seq, num_tiles, top
    )
    strength = _strength(base_mean, base_std, value_mean, value_std, lambda_c, GATED, EPS)
    o_t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_base, p_value = base_ptr + i_seq * length, value_ptr + i_seq * length
    _add_values(p_base, p_value, o_t, num_candidates, length, strength)


def pool_prefix(
    scores: torch.Tensor, num_candidates: torch.Tensor, kernel: int, kind: str = "avg"
) -> torch.Tensor:
    """See ``reference.pool_prefix``."""
    if kernel == 1:
        return scores
    num, num_heads, length = scores.shape
    pooled = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _pool_kernel[(num * num_heads, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        scores.contiguous(),
        num_candidates.contiguous(),
        pooled,
        num_heads,
        length,
        KERNEL=kernel,
        TAKE_MAX=kind == "max",
        BLOCK_T=_TOKENS_PER_PROGRAM,
    )
    return pooled


def bacon_calibrate(
    mean: torch.Tensor,
    last: torch.Tensor,
    trace: list[torch.Tensor],
    num_candidates: torch.Tensor,
    capacity: torch.Tensor,
    *,
    kernel: int,
    pool: str,
    mode: str,
    local_k: int,
    lambda_c: float,
    topk_frac: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``reference.bacon_calibrate``.

    After the values, B and V are read seven times each, from L2 where they fit: in one launch, or
    in seven where heads are long.
    """
    num, num_heads, length = mean.shape
    rows = num * num_heads
    results = torch.empty((3, num, num_heads, length), dtype=torch.float32, device=mean.device)
    base, final, evidence = results
    mean, last, num_candidates = mean.contiguous(), last.contiguous(), num_candidates.contiguous()
    traced = [old.contiguous() for old in trace]
    # in steps, so that the first layers do not each compile a kernel of their own
    traced += [mean] * (-len(trace) % _TRACE_STEP if trace else _TRACE_STEP)
    _value_kernel[(rows, triton.cdiv(length, _TOKENS_PER_PROGRAM))](
        mean,
        last,
        tuple(traced),
        num_candidates,
        base,
        evidence,
        final,
        len(trace),
        num_heads,
        length,
        KERNEL=kernel,
        TAKE_MAX=pool == "max",
        MODE=mode,
        LOCAL_K=local_k,
        EPS=EPS,
        BLOCK_T=_TOKENS_PER_PROGRAM,
    )
    limits = (num_candidates, capacity.contiguous())
    rule = {"TOPK_FRAC": topk_frac, "GATED": mode == "elt", "EPS": EPS}
    if length <= tiled_radix.LONG:
        _calibrate_kernel[(rows,)](
            base, final, *limits, num_heads, length, lambda_c,
            **rule, BLOCK=radix.BLOCK, num_warps=radix.NUM_WARPS,
        )  # fmt: skip
        return base, evidence, final
    tiles = tiled_radix.num_tiles(length)
    scratch = tiled_radix.new_scratch(2 * rows, mean.device)
    moments = torch.empty((2 * rows, tiles, 3), dtype=torch.float32, device=mean.device)
    sizes = {"BLOCK": tiled_radix.TILE, "num_warps": tiled_radix.NUM_WARPS}
    both = results[:2].view(2 * rows, length)
    _begin_statistics_kernel[(2 * rows,)](*limits, scratch, num_heads, rows, TOPK_FRAC=topk_frac)
    tiled_radix.find_thresholds(both, scratch)
    _moments_kernel[(2 * rows, tiles)](
        both, num_candidates, scratch, moments, num_heads, rows, length, tiles, **sizes
    )
    _add_values_kernel[(rows, tiles)](
        base, final, *limits, scratch, moments, num_heads, rows, length, tiles, lambda_c,
        **rule, **sizes,
    )  # fmt: skip
    return base, evidence, final
