# SPDX-License-Identifier: Apache-2.0
"""The k-th largest number of long rows: radix selection, many programs per row.

A launch per digit. Each program counts the digits of one tile and adds them to those of its row:
integers, so the order of programs does not matter. Which digit it is follows from the complete
counts, and every program of the next launch finds it for itself.

    scratch of a row, int32
    | 256 counts of pass 0 | pass 1 | pass 2 | pass 3 | end | bits and rest before pass 0 | ... 3 |

A row can have several parts, such as the heads of a request, that lie ``length`` apart.
"""

import torch
import triton
import triton.language as tl

from vllm_kvcompress.kernels import radix

LONG = 8192
"""Up to this many tokens a row fits into the registers of one program.

For selection, ``benchmarks/kernel_bench.py`` times both ways as "row" and "tile".
"""
TILE = 2048
NUM_WARPS = 8

_PASSES = tl.constexpr(4)
_END = tl.constexpr(4 * 256)
_FOUND = tl.constexpr(4 * 256 + 1)
_SCRATCH = tl.constexpr(4 * 256 + 16)
_TAIL = tl.constexpr(256 + 1)


@triton.jit
def scratch_row(scratch_ptr, i_row):
    return scratch_ptr + i_row * _SCRATCH


@triton.jit
def begin(p_scratch, end, count):
    """Ask for the ``count`` largest among entries [0, end) of all parts of a row."""
    tl.store(p_scratch + tl.arange(0, 1024), tl.zeros((1024,), tl.int32))
    tl.store(p_scratch + _END, tl.cast(end, tl.int32))
    tl.store(p_scratch + _FOUND, 0)
    tl.store(p_scratch + _FOUND + 1, tl.cast(count, tl.int32))


@triton.jit
def _bits_before(p_scratch, i_pass):
    """Bits found, uint32, and how many to take among the entries that have them, int32."""
    last = tl.maximum(i_pass - 1, 0)
    found = tl.load(p_scratch + _FOUND + 2 * last).to(tl.uint32, bitcast=True)
    rest = tl.load(p_scratch + _FOUND + 2 * last + 1)
    if i_pass > 0:
        b_num = tl.load(p_scratch + last * 256 + tl.arange(0, 256))
        found, rest = radix.next_digit(b_num, found, rest)
    return found, rest


@triton.jit
def threshold(p_scratch):
    """After all passes: see ``radix.threshold``."""
    return _bits_before(p_scratch, _PASSES)


@triton.jit
def tile_counts(tails_ptr, i_part, num_tiles, tiles, key):
    """Entries above ``key`` and entries equal to it in the first ``tiles`` tiles of a part.

    No data is read: the counts of the last pass, kept per tile, have them for any last digit.
    """
    p_tails = tails_ptr + i_part * num_tiles * _TAIL + (key & 255).to(tl.int32)
    num_above = tl.full((), 0, tl.int32)
    num_tied = tl.full((), 0, tl.int32)
    for start in range(0, tiles, 128):
        o_tile = start + tl.arange(0, 128)
        m_tile = o_tile < tiles
        at_least = tl.load(p_tails + o_tile * _TAIL, mask=m_tile, other=0)
        above = tl.load(p_tails + o_tile * _TAIL + 1, mask=m_tile, other=0)
        num_above += tl.sum(above, 0)
        num_tied += tl.sum(at_least - above, 0)
    return num_above, num_tied


@triton.jit(do_not_specialize=["i_pass"])
def _digit_kernel(
    values_ptr,  # [rows * parts, length] float32, the first num_first of them
    others_ptr,  # the other ones
    scratch_ptr,  # [rows, _SCRATCH] int32
    tails_ptr,  # [rows * parts, tiles, _TAIL] int32, or None
    i_pass,
    num_first,
    parts,
    length,
    num_tiles,
    BLOCK: tl.constexpr,
):
    """Counts of one digit in one tile, added to those of the row.

    The last pass also notes how many entries of the tile lie at or above each last digit.
    """
    i_part = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    p_scratch = scratch_row(scratch_ptr, i_part // parts)
    end = tl.load(p_scratch + _END)
    # an empty row finds its bits as well
    if (i_tile == 0) | (i_tile * BLOCK < end):
        found, rest = _bits_before(p_scratch, i_pass)
        shift = (24 - 8 * i_pass).to(tl.uint32)
        o_bin = tl.arange(0, 256)
        o_x = i_tile * BLOCK + tl.arange(0, BLOCK)
        m_x = o_x < end
        if i_part < num_first:
            b_x = tl.load(values_ptr + i_part * length + o_x, mask=m_x, other=0.0)
        else:
            b_x = tl.load(others_ptr + (i_part - num_first) * length + o_x, mask=m_x, other=0.0)
        key = radix.order_keys(b_x)
        bits = key >> shift >> 8
        digit = ((key >> shift) & 255).to(tl.int32)
        b_num = tl.histogram(digit, 256, mask=m_x & (bits == found))
        tl.atomic_add(p_scratch + i_pass * 256 + o_bin, b_num, mask=b_num > 0, sem="relaxed")
        if i_tile == 0:
            tl.store(p_scratch + _FOUND + 2 * i_pass, found.to(tl.int32, bitcast=True))
            tl.store(p_scratch + _FOUND + 2 * i_pass + 1, rest)
        if tails_ptr is not None:
            p_tail = tails_ptr + (i_part * num_tiles + i_tile) * _TAIL
            if i_pass == _PASSES - 1:
                above = tl.sum((m_x & (bits > found)).to(tl.int32), 0)
                tl.store(p_tail + o_bin, above + tl.cumsum(b_num, 0, reverse=True))
                tl.store(p_tail + 256, above)


def num_tiles(length: int) -> int:
    return triton.cdiv(length, TILE)


def new_scratch(rows: int, device: torch.device) -> torch.Tensor:
    """Scratch of rows, for a kernel that calls :func:`begin` on each."""
    return torch.empty((rows, _SCRATCH.value), dtype=torch.int32, device=device)


def new_tails(parts: int, length: int, device: torch.device) -> torch.Tensor:
    """Memory for what :func:`tile_counts` reads."""
    return torch.empty((parts, num_tiles(length), _TAIL.value), dtype=torch.int32, device=device)


def find_thresholds(
    values: torch.Tensor,
    scratch: torch.Tensor,
    tails: torch.Tensor | None = None,
    others: torch.Tensor | None = None,
) -> None:
    """All passes: afterwards kernels read :func:`threshold`, and ``tails`` if given.

    Args:
        values: [rows * parts, length] float32, contiguous.
        scratch: of the rows, begun.
        others: as many, of the second half of the rows.
    """
    parts, length = values.shape
    num_parts = parts if others is None else 2 * parts
    tiles = num_tiles(length)
    for i_pass in range(_PASSES.value):
        _digit_kernel[(num_parts, tiles)](
            values,
            values if others is None else others,
            scratch,
            tails,
            i_pass,
            parts,
            num_parts // len(scratch),
            length,
            tiles,
            BLOCK=TILE,
            num_warps=NUM_WARPS,
        )
