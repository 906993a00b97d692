# SPDX-License-Identifier: Apache-2.0
"""The k-th largest number of a row, found by its bits: no sorting, no scratch memory.

One program finds it. Rows longer than ``tiled_radix.LONG`` have many, see there.
"""

import triton
import triton.language as tl

BLOCK = 4096
"""Elements of a row that one program looks at at a time."""
NUM_WARPS = 16


@triton.jit
def order_keys(b_x):
    """uint32 keys that sort like the float32 numbers: NaN is 0, then -inf; both zeros are alike."""
    bits = b_x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    # a set sign bit turns the order of the other bits around
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(b_x != b_x, 0, key)


@triton.jit
def value_of(key):
    """The float32 number that has an order key."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def next_digit(b_num, found, rest):
    """Eight more bits of the key that is looked for.

    Args:
        b_num: [256] int32, how many entries with the bits found so far have each next digit.
        found: uint32, these bits.
        rest: int32, how many of these entries to take.

    Returns:
        The same two with the next digit.
    """
    o_bin = tl.arange(0, 256)
    at_least = tl.cumsum(b_num, 0, reverse=True)
    found_bin = tl.max(tl.where(at_least >= rest, o_bin, 0), 0)
    rest -= tl.sum(tl.where(o_bin > found_bin, b_num, 0), 0)
    return (found << 8) | found_bin.to(tl.uint32), rest


@triton.jit
def threshold(p_row, end, count, BLOCK: tl.constexpr):
    """Key of the ``count``-th largest of row[0:end), and how many entries with it are among them.

    Eight bits of the key per pass, highest first: a histogram of the entries that agree with the
    bits found so far says which next eight bits the ``count``-th largest has. Reads the row four
    times. Everything above the key, and the first ``rest`` entries that equal it, are the
    ``count`` best; with a count of 0 nothing is, and with one beyond ``end`` all entries are.

    Args:
        p_row: float32 row.
        end, count: int32 scalars.

    Returns:
        key uint32, rest int32.
    """
    found = tl.full((), 0, tl.uint32)  # bits found so far
    rest = count  # how many to take among the entries that have these bits
    shift = tl.full((), 32, tl.uint32)
    for _ in range(4):
        shift -= 8
        b_num = tl.zeros((256,), tl.int32)
        for start in range(0, end, BLOCK):
            o_x = start + tl.arange(0, BLOCK)
            key = order_keys(tl.load(p_row + o_x, mask=o_x < end, other=0.0))
            agrees = (o_x < end) & ((key >> shift >> 8) == found)
            digit = ((key >> shift) & 255).to(tl.int32)
            b_num += tl.histogram(digit, 256, mask=agrees)
        found, rest = next_digit(b_num, found, rest)
    return found, rest
