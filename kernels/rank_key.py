"""One integer for a number and its place, so that a plain integer maximum finds the largest, the first of them on ties.

What is computed from such keys does not depend on the order of the reduction, hence not on the number of threads.
"""

import triton
import triton.language as tl


@triton.jit
def rank_key(value, index):
    """uint64: larger for a larger float32 `value`, and among equal ones for a lower `index` (at most 32 bits)."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)  # -0.0 equals 0.0
    ordered = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return (ordered.to(tl.uint64) << 32) | (0xFFFFFFFF - index.to(tl.uint64))


@triton.jit
def key_value(key):
    ordered = (key >> 32).to(tl.uint32)
    bits = tl.where(ordered >= 0x80000000, ordered ^ 0x80000000, ordered ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def key_index(key):
    return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int64)


def tile_width(row_width: int) -> int:
    """At most 128 tiles in a row, so that its tiles' results are a small problem, and no more than they need be.

    A function of the row's width alone: a row gives the same bits whatever rows are beside it.
    """
    return max(256, triton.next_power_of_2(triton.cdiv(row_width, 128)))
