# SPDX-License-Identifier: Apache-2.0
"""The k-th largest number of a row, found by its bits: no sorting, no scratch memory.

One program holds the row in its registers. Rows longer than ``tiled_radix.LONG`` have many
programs, see there.
"""

import triton
import triton.language as tl


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
def num_at_least(b_key, key):
    return tl.sum((b_key >= key).to(tl.int32), 0)


@triton.jit
def threshold(b_key, count):
    """Key of the ``count``-th largest of a row, and how many entries with it are among them.

    Two bits of the key per pass, highest first. Everything above the key, and the first ``rest``
    entries that equal it, are the ``count`` best; with a count of 0 nothing is, and with one beyond
    the number of entries all entries are.

    Args:
        b_key: uint32 order keys, 0 where there is no entry.
        count: int32 scalar.

    Returns:
        key uint32, rest int32.
    """
    found = tl.full((), 0, tl.uint32)
    above = tl.full((), 0, tl.int32)  # entries above the keys that begin with the bits found
    step = tl.full((), 1 << 30, tl.uint32)
    for _ in range(16):
        one = num_at_least(b_key, found + step)
        two = num_at_least(b_key, found + 2 * step)
        three = num_at_least(b_key, found + 3 * step)
        digit = (one >= count).to(tl.uint32) + (two >= count).to(tl.uint32)
        digit += (three >= count).to(tl.uint32)
        above = tl.where(
            one < count, one, tl.where(two < count, two, tl.where(three < count, three, above))
        )
        found += digit * step
        step >>= 2
    return found, count - above


def sizes(length: int) -> dict[str, int]:
    """Room for a row in the registers of one program, and its warps."""
    block = max(1024, triton.next_power_of_2(length))
    return {"BLOCK": block, "num_warps": min(16, block // 512)}
