# SPDX-License-Identifier: Apache-2.0
"""How the keys of sequences are shared out among programs, so that a GPU is full.

Sums over keys are kept for every ``KEYS_PER_PART`` keys, however many of these parts a program
takes: what comes out does not depend on the number of sequences in a call.
"""

import functools

import torch
import triton
import triton.language as tl

KEYS_PER_PART = 256
"""Keys whose maximum and sum of exponentials go to memory together."""

_MULTIPROCESSORS = 132  # of an H100, where there is no GPU to ask
_PROGRAMS_EACH = 2  # that one multiprocessor runs at the same time
_START = 1  # parts' worth of time that a program takes before its first key
_MOST = 64  # splits that are looked at


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def parts_per_split(sequences: int, length: int, device: torch.device) -> int:
    """Parts that one program takes, so that the last wave of programs ends soonest.

    Args:
        sequences: (row, head) pairs that share nothing.
        length: keys of the longest.
    """
    room = _PROGRAMS_EACH * num_multiprocessors(device)
    parts = triton.cdiv(length, KEYS_PER_PART)

    def time(splits: int) -> int:
        each = triton.cdiv(parts, splits)
        waves = triton.cdiv(sequences * triton.cdiv(parts, each), room)
        return waves * (each + _START)

    return triton.cdiv(parts, min(range(1, min(parts, _MOST) + 1), key=time))


@triton.jit(do_not_specialize=["num_parts", "width", "per_row"])
def _combine_kernel(
    max_ptr,  # [sequences, parts, width] float32
    sum_ptr,  # [sequences, parts, width] float32
    lens_ptr,  # [R] int64
    lse_ptr,  # [sequences, width] float32
    num_parts,
    width,
    per_row,  # sequences of a row
    KEYS_PER_PART: tl.constexpr,
    BASE_2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Log-sum-exps of some columns of a sequence from those of the parts that it has."""
    i_seq = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(tl.load(lens_ptr + i_seq // per_row).to(tl.int32), KEYS_PER_PART)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_max = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        mask = (o_p < parts)[:, None] & (o_c < width)[None, :]
        offset = (i_seq * num_parts + o_p)[:, None] * width + o_c[None, :]
        b_peaks = tl.load(max_ptr + offset, mask=mask, other=float("-inf"))
        b_sums = tl.load(sum_ptr + offset, mask=mask, other=0.0)
        new_max = tl.maximum(b_max, tl.max(b_peaks, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if BASE_2:
            b_sums *= tl.exp2(b_peaks - shift[None, :])
            b_sum = b_sum * tl.exp2(b_max - shift) + tl.sum(b_sums, 0)
        else:
            b_sums *= tl.exp(b_peaks - shift[None, :])
            b_sum = b_sum * tl.exp(b_max - shift) + tl.sum(b_sums, 0)
        b_max = new_max
    b_sum = tl.where(b_sum == 0, 1.0, b_sum)  # of columns that nobody looks at
    b_lse = b_max + (tl.log2(b_sum) if BASE_2 else tl.log(b_sum))
    tl.store(lse_ptr + i_seq * width + o_c, b_lse, mask=o_c < width)


def new_partial(sequences: int, length: int, width: int, device: torch.device) -> torch.Tensor:
    """[2, sequences, parts, width] float32: maxima, and sums of exponentials less the maximum."""
    shape = (2, sequences, triton.cdiv(length, KEYS_PER_PART), width)
    return torch.empty(shape, dtype=torch.float32, device=device)


def combine(partial: torch.Tensor, lens: torch.Tensor, base_2: bool = False) -> torch.Tensor:
    """Log-sum-exps [sequences, width] of all parts that hold keys.

    Args:
        partial: as from :func:`new_partial`; parts past the end of a row's keys hold anything.
        lens: [R] int64, keys of each row; a row has as many sequences as any other.
        base_2: exponentials and logarithms are to the base 2.
    """
    _, sequences, num_parts, width = partial.shape
    lse = torch.empty((sequences, width), dtype=torch.float32, device=partial.device)
    _combine_kernel[(sequences, triton.cdiv(width, 64))](
        partial[0], partial[1], lens.contiguous(), lse, num_parts, width, sequences // len(lens),
        KEYS_PER_PART=KEYS_PER_PART, BASE_2=base_2, BLOCK_P=16, BLOCK_C=64,
    )  # fmt: skip
    return lse
