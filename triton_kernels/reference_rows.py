# SPDX-License-Identifier: Apache-2.0
"""Plain definitions of attention of single rows on a whole prompt, a part of ``reference.py``."""

import math

import torch
import torch.nn.functional as F

_ROWS_AT_ONCE = 32
"""Rows of the instruction whose logits over all keys are in memory at the same time."""

UNIT_BITS = 39
"""Masses are counted in units: the largest of a group has this many bits."""
SHARE_BITS = 30
"""Shares of a group's mass are multiples of 2**-30."""

EQUAL_UP_TO = 1e-6
"""Deviation, relative to the mean, that rounding alone can cause."""


def row_logits(
    queries: torch.Tensor,
    keys: torch.Tensor,
    last_seen: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Logits of M rows on all keys, -inf on those that a row does not see.

    Args:
        queries: [N, M, Hq, D].
        keys: [N, Hkv, T, D]; anything that no row sees.
        last_seen: [N, M] or [N, 1] int64, last position that a row sees; below 0: none.
        scale: [N] float32.

    Returns:
        [N, Hkv, G, M, T] float32.
    """
    num, rows, num_q_heads, head_size = queries.shape
    num_kv_heads, length = keys.shape[1:3]
    group = num_q_heads // num_kv_heads
    grouped = (queries.float() * scale[:, None, None, None]).view(
        num, rows, num_kv_heads, group, head_size
    )
    grouped = grouped.permute(0, 2, 3, 1, 4).reshape(num, num_kv_heads, group * rows, head_size)
    logits = torch.matmul(grouped, keys.float().transpose(2, 3))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.view(num, num_kv_heads, group, rows, length)
    hidden = torch.arange(length, device=keys.device) > last_seen[:, :, None]
    return logits.masked_fill_(hidden[:, None, None], float("-inf"))


def group_attention_sum(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    num_groups: int,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention that groups of rows after the prompt pay to each of its keys.

    Args:
        queries: [N, M, Hq, D]; group b is rows [b * M / NG, (b + 1) * M / NG), and all of them see
            the whole prompt.
        keys: [N, Hkv, T, D]; anything at t >= P.
        prompt_lens: [N] int64, P.
        num_groups: NG, a divisor of M.

    Returns:
        [N, Hkv, NG, T] float32, summed over the rows of a group, mean over the query heads of a KV
        head; 0 at t >= P.
    """
    last = prompt_lens[:, None] - 1
    # one group at a time: the probabilities of all rows would take NG times the memory
    masses = [
        row_logits(group, keys, last, scale, softcap).softmax(-1).sum(3).mean(2)
        for group in queries.chunk(num_groups, dim=1)
    ]
    return torch.stack(masses, dim=2)


def cover_votes(masses: torch.Tensor, end: torch.Tensor, tau: float, cover: str) -> torch.Tensor:
    """Number of groups whose cover holds a token, [N, Hkv, T] float32.

    A group's cover is a prefix of the tokens in order of decreasing mass, ties by position. Sums
    are exact, so that no order of adding them up changes a cover: a group's masses are cut to whole
    multiples of 2**-39 times the power of two above the largest of them, and tau is rounded to a
    multiple of 2**-30.

    Args:
        masses: [N, Hkv, NG, T] attention that each group pays, any scale; not negative. T is at
            most 2**20.
        end: [N] int64, tokens at t >= end stand outside and get no votes.
        tau: share of a group's mass that its cover holds.
        cover: the longest prefix of at most that share ("floor"), or the shortest of at least that
            share ("min").
    """
    position = torch.arange(masses.shape[3], device=masses.device)
    outside = (position >= end[:, None])[:, None, None]
    ranked = masses.masked_fill(outside, -1.0).sort(dim=3, descending=True, stable=True)
    inside = ranked.values >= 0
    held = _units(ranked.values.clamp_min(0)).cumsum(3)
    share = share_of(tau)
    # the product would not fit into 64 bits
    high, low = held[..., -1:] >> SHARE_BITS, held[..., -1:] % (1 << SHARE_BITS)
    if cover == "floor":
        covered = held <= high * share + (low * share >> SHARE_BITS)
    else:
        goal = high * share - (-low * share >> SHARE_BITS)
        covered = F.pad(held[..., :-1], (1, 0)) < goal
    covered &= inside
    return torch.zeros_like(masses).scatter(3, ranked.indices, covered.float()).sum(2)


def share_of(tau: float) -> int:
    """A share in units of 2**-30."""
    return round(tau * (1 << SHARE_BITS))


def _units(ranked: torch.Tensor) -> torch.Tensor:
    """Masses [..., T], largest first, in units of their row, int64."""
    exponent = torch.frexp(ranked[..., :1]).exponent
    # the power of two is made of bits, because exp2 may be off by the last one
    unit = (UNIT_BITS - exponent + 1023).long() << 52
    return (ranked.double() * unit.view(torch.float64)).long()


def last_row_logits(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Logits of the last prompt row on the instruction: the prompt's last I tokens.

    Args:
        queries: [N, Q, Hq, D] of positions P-Q .. P-1; only the last is looked at.
        keys: [N, Hkv, T, D]; anything at t >= P.
        prompt_lens: [N] int64, P.
        instruction_len: [N] int64, I; at most Q and P.

    Returns:
        [N, Hq, Q] float32 for positions P-Q .. P-1, -inf before the instruction.
    """
    num_rows, num_q_heads = queries.shape[1:3]
    row = torch.arange(num_rows, device=keys.device) - num_rows
    position = (prompt_lens[:, None] + row).clamp_min(0)[:, None, :, None]  # [N, 1, Q, 1]
    text = keys.gather(2, position.expand(-1, keys.shape[1], -1, keys.shape[3]))
    last = queries[:, -1].unflatten(1, (keys.shape[1], -1)).float()  # [N, Hkv, G, D]
    logits = torch.matmul(last * scale[:, None, None, None], text.float().transpose(2, 3))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    before = row < -instruction_len[:, None]
    return logits.view(-1, num_q_heads, num_rows).masked_fill(before[:, None], float("-inf"))


def elite_attention(
    queries: torch.Tensor,
    elite: torch.Tensor,
    segment: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Mean attention of each query head's elite rows on visual tokens.

    The softmax of a row runs over the visual tokens and the elite's own, as far as it sees them.

    Args:
        queries: [N, Q, Hq, D] of positions P-Q .. P-1; anything in rows that are nobody's elite.
        elite: [N, Hq, Q] bool, whether a row is one of the head's elite; false before position 0.
        segment: [N, T] int64, not negative for visual tokens; anything at t >= P.
        keys: [N, Hkv, T, D]; anything at t >= P.
        prompt_lens: [N] int64, P.

    Returns:
        [N, Hq, T] float32, 0 off the visual tokens; NaN on those of heads that have no elite.
    """
    num_rows, length = queries.shape[1], keys.shape[2]
    first = prompt_lens[:, None] - num_rows
    # [N, 1, T]; what looks visual past the prompt's end is not seen by any row
    visual = (segment >= 0)[:, None]
    column = torch.arange(length, device=keys.device) - first  # [N, T], of elite
    in_rows = (column >= 0) & (column < num_rows)
    column = column.clamp(0, num_rows - 1)[:, None].expand(-1, elite.shape[1], -1)
    apart = ~(visual | (elite.gather(2, column) & in_rows[:, None]))
    total = torch.zeros(apart.shape, device=keys.device)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows), device=keys.device)
        tile = queries[:, start : start + _ROWS_AT_ONCE]
        logits = row_logits(tile, keys, first + rows, scale, softcap).flatten(1, 2)
        probs = logits.masked_fill_(apart[:, :, None], float("-inf")).softmax(3)
        counts = elite[:, :, start : start + _ROWS_AT_ONCE, None]
        total += probs.masked_fill_(~counts, 0.0).sum(2)
    return (total / elite.sum(2, keepdim=True)).masked_fill(~visual, 0.0)


def strong_key_counts(
    queries: torch.Tensor,
    keys: torch.Tensor,
    prompt_lens: torch.Tensor,
    instruction_len: torch.Tensor,
    scale: torch.Tensor,
    softcap: float = 0.0,
    threshold: float = 0.01,
) -> torch.Tensor:
    """How many keys each row of the instruction looks at with ``threshold`` of its top attention.

    The softmax of a row divides all of it alike, so that logits are compared instead.

    Args:
        queries: [N, Q, Hq, D] of positions P-Q .. P-1; anything before the instruction.
        keys: [N, Hkv, T, D]; anything at t >= P.
        prompt_lens: [N] int64, P.
        instruction_len: [N] int64, I; at most Q and P.
        threshold: share of the row's largest attention, 0 for all keys that the row sees.

    Returns:
        [N, Hq, Q] int32, 0 before the instruction.
    """
    num_rows = queries.shape[1]
    least = log_share(threshold)
    position = torch.arange(keys.shape[2], device=keys.device)
    counts = []
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows), device=keys.device)
        last_seen = prompt_lens[:, None] - num_rows + rows  # [N, M]
        tile = queries[:, start : start + _ROWS_AT_ONCE]
        logits = row_logits(tile, keys, last_seen, scale, softcap).flatten(1, 2)
        strong = logits >= logits.amax(3, keepdim=True) + least
        counts_here = rows >= num_rows - instruction_len[:, None]
        strong &= ((position <= last_seen[..., None]) & counts_here[..., None])[:, None]
        counts.append(strong.sum(3))
    return torch.cat(counts, dim=2).int()


def log_share(share: float) -> float:
    """What a share of the largest attention is below the largest logit."""
    return math.log(share) if share else -math.inf


def strength_and_skewness(
    importance: torch.Tensor, segment: torch.Tensor, prompt_lens: torch.Tensor
) -> torch.Tensor:
    """Sum and bias-corrected skewness, not below 0, of the attention on visual tokens.

    Args:
        importance: [N, T] float32, 0 off the visual tokens.
        segment: [N, T] int64, not negative for visual tokens; anything at t >= P.
        prompt_lens: [N] int64, P.

    Returns:
        [N, 2] float64; 1 and 0 where a prompt has fewer than 3 visual tokens, so that all of its
        layers look alike. Values that are equal but for rounding have no skewness.
    """
    position = torch.arange(importance.shape[1], device=importance.device)
    visual = (segment >= 0) & (position < prompt_lens[:, None])
    importance, count = importance.double(), visual.sum(1).double()
    strength = importance.masked_fill(~visual, 0.0).sum(1)
    mean = strength / count
    spread = (importance - mean[:, None]).masked_fill(~visual, 0.0)
    deviation = (spread.square().sum(1) / (count - 1)).sqrt()
    cubes = (spread / deviation[:, None]).pow(3).sum(1)
    skewness = count / ((count - 1) * (count - 2)) * cubes
    skewness = torch.where(deviation > EQUAL_UP_TO * mean, skewness.clamp_min(0), 0.0)
    few = count < 3
    return torch.stack([strength.masked_fill(few, 1.0), skewness.masked_fill(few, 0.0)], dim=1)
