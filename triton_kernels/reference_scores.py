# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of what happens to scores, a part of ``reference.py``."""

import torch
import torch.nn.functional as F

from vllm_kvcompress.kernels.reference_grid import Grids, pool_columns, token_lines

EPS = 1e-8


def pool_prefix(
    scores: torch.Tensor,
    num_candidates: torch.Tensor,
    kernel: int,
    kind: str = "avg",
    grids: Grids | None = None,
) -> torch.Tensor:
    """Pooling over the scored prefix, stride 1, same length.

    "avg" divides by ``kernel`` everywhere: positions outside the prefix count as zeros. "max"
    ignores them. Scores at t >= n come back as 0.

    Args:
        scores: [R, Hkv, T] float32.
        num_candidates: [R] int64, n.
        grids: images that are pooled along their columns; positions outside them count as those
            outside the prefix do.
    """
    if kernel == 1:
        return scores
    outside = _outside(scores, num_candidates)
    if kind == "avg":
        x = scores.masked_fill(outside, 0.0)
        pooled = F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
    else:
        x = scores.masked_fill(outside, float("-inf"))
        pooled = F.max_pool1d(x, kernel, stride=1, padding=kernel // 2)
    if grids is not None:
        columns = pool_columns(x, num_candidates, kernel, kind, grids)
        pooled = torch.where((token_lines(grids)[3] > 0)[:, None], columns, pooled)
    return pooled.masked_fill(outside, 0.0)


def bacon_evidence(
    mean: torch.Tensor,
    last: torch.Tensor,
    num_candidates: torch.Tensor,
    *,
    kernel: int,
    pool: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled window mean B, and what the last prompt row sees more of: E = max(Q - B, 0).

    Args:
        mean, last: [R, Hkv, T] float32 of ``window_scores``, finite at t < n, 0 at t >= n.
        num_candidates: [R] int64, n.
        kernel, pool: of :func:`pool_prefix`, for both.

    Returns:
        B and E, each [R, Hkv, T] float32; at t >= n, B is -inf and E is 0.
    """
    base = pool_prefix(mean, num_candidates, kernel, pool)
    evidence = (pool_prefix(last, num_candidates, kernel, pool) - base).clamp_min(0)
    return base.masked_fill(_outside(base, num_candidates), float("-inf")), evidence


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
    """BACON's calibrated score S = B + lambda * V.

    Args:
        base, evidence: B and E of :func:`bacon_evidence`, [R, Hkv, T] each.
        trace: [Lt, N, Hkv, T] float32, what layers leave for later ones, oldest first. Its last
            R / N layers are those of the rows.
        num_candidates: [R] int64, n.
        capacity: [R] int64, nominal competing tokens per head.
        grids: of :func:`pool_prefix`, for coherence.
        trace_r: how many layers before its own a row looks at; there may be fewer, or none.
        mode: "e", "el", "elt" or "rel".

    Returns:
        [R, Hkv, T] float32, -inf at t >= n.
    """
    outside = _outside(base, num_candidates)
    base, value = base.masked_fill(outside, 0.0), evidence
    if mode != "e":
        value = value + bacon_coherence(base, evidence, num_candidates, mode, local_k, grids)
    if mode in ("elt", "rel"):
        value = value + bacon_persistence(trace, len(base), trace_r, mode)
    top = (topk_frac * capacity.double()).long().clamp_min(1).minimum(num_candidates)
    base_mean, base_std = _top_statistics(base, num_candidates, top)
    value_mean, value_std = _top_statistics(value, num_candidates, top)
    strength = lambda_c * base_std / (value_std + EPS)
    if mode == "elt":
        strength = strength * (value_mean / (base_mean + EPS)).clamp(0, 1)
    return (base + strength[:, :, None] * value).masked_fill(outside, float("-inf"))


def bacon_coherence(
    base: torch.Tensor,
    evidence: torch.Tensor,
    num_candidates: torch.Tensor,
    mode: str,
    local_k: int,
    grids: Grids | None = None,
) -> torch.Tensor:
    """How much evidence lies around each token, [R, Hkv, T].

    Args:
        base, evidence: B and E of :func:`bacon_evidence`, with B = 0 at t >= n.
        mode: "rel" attenuates it where the token's own B is high beside its neighbours'.
        grids: see :func:`pool_prefix`.
    """
    coherence = pool_prefix(evidence, num_candidates, local_k, grids=grids)
    if mode == "rel":
        neighbours = pool_prefix(base, num_candidates, local_k, grids=grids)
        coherence = coherence * neighbours / (neighbours + base + EPS)
    return coherence


def bacon_persistence(trace: torch.Tensor, num_rows: int, trace_r: int, mode: str) -> torch.Tensor:
    """What the layers before each row's own agree on, [R, Hkv, T]; 0 where there is none.

    Args:
        trace, trace_r: of :func:`bacon_calibrate`.
        num_rows: R.
        mode: "rel" takes the deviation of these layers off.
    """
    rows = []
    for layer in range(len(trace) - num_rows // trace.shape[1], len(trace)):
        seen = trace[max(layer - trace_r, 0) : layer]
        if not len(seen):
            rows.append(torch.zeros_like(trace[layer]))
            continue
        mean = seen.mean(0)
        if mode == "rel":
            mean = (mean - seen.std(0, correction=0)).clamp_min(0)
        rows.append(mean)
    return torch.cat(rows)


def _outside(scores: torch.Tensor, num_candidates: torch.Tensor) -> torch.Tensor:
    """[R, 1, T] bool, positions past the scored prefix."""
    position = torch.arange(scores.shape[2], device=scores.device)
    return (position >= num_candidates[:, None])[:, None]


def _top_statistics(
    scores: torch.Tensor, num_candidates: torch.Tensor, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population deviation of the ``top`` [R] largest of each head's prefix.

    Returns:
        [R, Hkv] each.
    """
    position = torch.arange(scores.shape[2], device=scores.device)
    ranked = scores.masked_fill(_outside(scores, num_candidates), float("-inf"))
    ranked = ranked.sort(dim=2, descending=True).values
    count = top[:, None, None]
    outside = position >= count
    mean = ranked.masked_fill(outside, 0.0).sum(2, keepdim=True) / count
    square = (ranked - mean).square().masked_fill(outside, 0.0).sum(2) / top[:, None]
    return mean[..., 0], square.sqrt()


def select_tokens(
    scores: torch.Tensor,
    count: torch.Tensor,
    candidate_end: torch.Tensor,
    protected_end: torch.Tensor,
    max_count: int,
) -> torch.Tensor:
    """Exact top-k of every head, in ascending position.

    Candidates are positions [0, candidate_end); [candidate_end, protected_end) is always kept and
    counts. Larger scores first, ties by lower position; NaN ranks below -inf.

    Args:
        scores: [R, Hkv, T] float32.
        count: [R, Hkv] int64, positions to keep, protected ones included.
        candidate_end, protected_end: [R] int64.
        max_count: at least ``count.max()``, known to the host.

    Returns:
        [R, Hkv, max_count] int64; entries beyond ``count`` are T (out of range).
    """
    length = scores.shape[2]
    position = torch.arange(length, device=scores.device)
    bits = (scores + 0.0).view(torch.int32)  # +0.0: both zeros rank alike
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # order-preserving
    key = key.masked_fill(scores.isnan(), -(1 << 31))
    candidate = position < candidate_end[:, None]
    protected = ~candidate & (position < protected_end[:, None])
    key = key.masked_fill(protected[:, None], 1 << 31)
    key = key.masked_fill(~(candidate | protected)[:, None], -(1 << 32))
    ranked = key.argsort(dim=2, descending=True, stable=True)[:, :, :max_count]
    rank = torch.arange(ranked.shape[2], device=scores.device)
    return ranked.masked_fill(rank >= count[:, :, None], length).sort(dim=2).values


def head_counts(base: torch.Tensor, capacity: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Entries of each head among the Hkv * b best of its layer.

    Larger scores first, ties by lower head, then by earlier rank inside the head; NaN ranks with
    -inf. Sums of scores are taken in double precision, so that their order does not matter.

    Args:
        base: [R, Hkv, T] float32, -inf at t >= n.
        capacity: [R] int64, b; 1 <= b <= T.
        normalize: first scale each head by the share of its mass that its own top b holds, mass
            being the sum of its positive scores.

    Returns:
        [R, Hkv] int64 with row sums Hkv * b.
    """
    num, num_heads, length = base.shape
    ranked = base.masked_fill(base.isnan(), float("-inf")).sort(dim=2, descending=True).values
    if normalize:
        mass = ranked.clamp_min(0).double().cumsum(2)  # -inf padding adds nothing
        top = mass.gather(2, (capacity - 1)[:, None, None].expand(-1, num_heads, 1))
        # a head without mass has nothing to scale
        ranked = ranked * (top / mass[:, :, -1:]).nan_to_num(1.0).float()
    flat = ranked.reshape(num, num_heads * length)
    order = flat.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(flat.shape[1], device=base.device) < (num_heads * capacity)[:, None]
    counts = torch.zeros(num, num_heads, dtype=torch.int64, device=base.device)
    return counts.scatter_add(1, order // length, chosen.long())
