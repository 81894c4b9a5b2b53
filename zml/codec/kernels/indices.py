"""Positions of entries inside a chunk: ascending, each once. Five ways to write them.

    gap8     a byte for what lies between two entries; 255: and more in the next byte
    off12    how many entries each block of 4,096 has, a byte each; then 12 bits for each, low bits first
    rice     Golomb-Rice (Rice and Plaunt, 1971) of the gaps, low bits first; the parameter follows from the counts
    bitmap   a bit for each element of the chunk
    dense    nothing: every element outside of vectors has an entry

Readers take any bytes, write only into `pos` and below its length, and return 0 or the negative of a reason.
Bytes have one meaning and a meaning has one spelling: what is left over must be zero, or not there.
"""

from typing import Any

import numpy as np
from numba import njit

from . import reasons
from .bits import ones, trailing_zeros

GAP8, OFF12, RICE, BITMAP, DENSE = range(5)
BLOCK = 4096

_GAPS_SHORT, _GAPS_LONG = reasons.GAPS_SHORT, reasons.GAPS_LONG
_OFFSETS_SIZE, _OFFSETS_COUNT = reasons.OFFSETS_SIZE, reasons.OFFSETS_COUNT
_OFFSETS_ORDER, _OFFSETS_PADDING = reasons.OFFSETS_ORDER, reasons.OFFSETS_PADDING
_RICE_SHORT, _RICE_LONG = reasons.RICE_SHORT, reasons.RICE_LONG
_BITMAP_SIZE, _BITMAP_COUNT, _OUTSIDE = reasons.BITMAP_SIZE, reasons.BITMAP_COUNT, reasons.OUTSIDE


@njit
def rice_bits(n: int, size: int) -> int:
    """The parameter for n entries in size elements: log2 of 0.69 times the mean gap, rounded down."""
    left = (size * 11_357) // (n * 16_384)
    bits = 0
    while left > 1:
        left >>= 1
        bits += 1
    return bits


@njit
def most_bytes(coding: int, n: int, size: int) -> int:
    """No index section of n entries in a chunk of this size has more bytes, as it is before LZ4."""
    if coding == GAP8:
        return n + size // 255
    if coding == OFF12:
        return (size + BLOCK - 1) // BLOCK + (3 * n + 1) // 2
    if coding == RICE:
        bits = rice_bits(n, size)
        return (n * (bits + 1) + (size >> bits) + 7) // 8
    return (size + 7) // 8 if coding == BITMAP else 0


# -- writing -----------------------------------------------------------------------------------------------


@njit
def put_gap8(pos: Any, n: int, out: Any, at: int) -> int:
    last = -1
    for i in range(n):
        here = np.int64(pos[i])
        gap = here - last - 1
        while gap >= 255:
            out[at] = 255
            at += 1
            gap -= 255
        out[at] = gap
        at += 1
        last = here
    return at


@njit
def fits_off12(pos: Any, n: int) -> bool:
    """No block has more than 255 entries."""
    for i in range(n - 255):
        if (np.int64(pos[i]) >> 12) == (np.int64(pos[i + 255]) >> 12):
            return False
    return True


@njit
def put_off12(pos: Any, n: int, size: int, out: Any, at: int) -> int:
    blocks = (size + BLOCK - 1) // BLOCK
    for block in range(blocks):
        out[at + block] = 0
    for i in range(n):
        out[at + (np.int64(pos[i]) >> 12)] += 1
    at += blocks
    i = 0
    while i + 1 < n:
        pair = (np.int64(pos[i]) & 4095) | ((np.int64(pos[i + 1]) & 4095) << 12)
        out[at] = pair & 255
        out[at + 1] = (pair >> 8) & 255
        out[at + 2] = pair >> 16
        at += 3
        i += 2
    if i < n:
        out[at] = np.int64(pos[i]) & 255
        out[at + 1] = (np.int64(pos[i]) >> 8) & 15
        at += 2
    return at


@njit
def size_rice(pos: Any, n: int, size: int) -> int:
    """Bytes that `put_rice` writes."""
    bits = rice_bits(n, size)
    last, total = -1, n * (bits + 1)
    for i in range(n):
        here = np.int64(pos[i])
        total += (here - last - 1) >> bits
        last = here
    return (total + 7) // 8


@njit
def put_rice(pos: Any, n: int, size: int, out: Any, at: int) -> int:
    bits = rice_bits(n, size)
    held, have, last = np.uint64(0), 0, -1
    for i in range(n):
        here = np.int64(pos[i])
        gap = here - last - 1
        last = here
        many = gap >> bits
        while many > 0:
            take = min(many, 32)
            held |= np.uint64((1 << take) - 1) << np.uint64(have)
            have += take
            many -= take
            while have >= 8:
                out[at] = np.uint8(held & np.uint64(255))
                at += 1
                held >>= np.uint64(8)
                have -= 8
        have += 1  # a zero ends the unary part
        held |= np.uint64(gap & ((1 << bits) - 1)) << np.uint64(have)
        have += bits
        while have >= 8:
            out[at] = np.uint8(held & np.uint64(255))
            at += 1
            held >>= np.uint64(8)
            have -= 8
    if have > 0:
        out[at] = np.uint8(held & np.uint64(255))
        at += 1
    return at


@njit
def put_bitmap(pos: Any, n: int, size: int, out: Any, at: int) -> int:
    many = (size + 7) // 8
    for i in range(many):
        out[at + i] = 0
    for i in range(n):
        here = np.int64(pos[i])
        out[at + (here >> 3)] |= np.uint8(1 << (here & 7))
    return at + many


# -- reading -----------------------------------------------------------------------------------------------


@njit
def get_gap8(data: Any, at: int, end: int, n: int, size: int, pos: Any) -> int:
    here = -1
    for i in range(n):
        while True:
            if at >= end:
                return -_GAPS_SHORT
            gap = np.int64(data[at])
            at += 1
            here += gap
            if gap != 255:
                break
        here += 1
        if here >= size:
            return -_OUTSIDE
        pos[i] = here
    return 0 if at == end else -_GAPS_LONG


@njit
def get_off12(data: Any, at: int, end: int, n: int, size: int, pos: Any) -> int:
    blocks = (size + BLOCK - 1) // BLOCK
    if end - at != blocks + (3 * n + 1) // 2:
        return -_OFFSETS_SIZE
    total = 0
    for block in range(blocks):
        total += np.int64(data[at + block])
    if total != n:
        return -_OFFSETS_COUNT
    codes = at + blocks
    i = 0
    for block in range(blocks):
        last = -1
        many = np.int64(data[at + block])
        if many > n - i:  # the counts were n in all: a peer changes shared memory while it is read
            return -_OFFSETS_COUNT
        for _ in range(many):
            byte = codes + (i >> 1) * 3
            if i & 1:
                offset = (np.int64(data[byte + 1]) >> 4) | (np.int64(data[byte + 2]) << 4)
            else:
                offset = np.int64(data[byte]) | ((np.int64(data[byte + 1]) & 15) << 8)
            if offset <= last:
                return -_OFFSETS_ORDER
            last = offset
            here = (block << 12) + offset
            if here >= size:
                return -_OUTSIDE
            pos[i] = here
            i += 1
    if i != n:
        return -_OFFSETS_COUNT
    if n & 1 and data[end - 1] >> 4:
        return -_OFFSETS_PADDING
    return 0


@njit
def get_rice(data: Any, at: int, end: int, n: int, size: int, pos: Any) -> int:
    bits = rice_bits(n, size)
    low = np.uint64((1 << bits) - 1)
    held, have, here = np.uint64(0), 0, -1
    for i in range(n):
        many = 0
        while True:
            while have <= 48 and at < end:
                held |= np.uint64(data[at]) << np.uint64(have)
                have += 8
                at += 1
            run = trailing_zeros(~held)
            if run < have:
                many += run
                held >>= np.uint64(run + 1)
                have -= run + 1
                break
            if at >= end:
                return -_RICE_SHORT
            many += have
            held, have = np.uint64(0), 0
            if many << bits >= size:
                return -_OUTSIDE
        while have < bits and at < end:
            held |= np.uint64(data[at]) << np.uint64(have)
            have += 8
            at += 1
        if have < bits:
            return -_RICE_SHORT
        here += (many << bits) + np.int64(held & low) + 1
        held >>= np.uint64(bits)
        have -= bits
        if here >= size:
            return -_OUTSIDE
        pos[i] = here
    return 0 if at == end and have < 8 and held == np.uint64(0) else -_RICE_LONG


@njit
def get_bitmap(data: Any, at: int, end: int, n: int, size: int, pos: Any) -> int:
    many = (size + 7) // 8
    if end - at != many:
        return -_BITMAP_SIZE
    total = 0
    for i in range(many):
        total += ones(np.uint64(data[at + i]))
    if total != n:
        return -_BITMAP_COUNT
    i = 0
    for byte in range(many):
        left = np.uint64(data[at + byte])
        while left:
            here = (byte << 3) + trailing_zeros(left)
            left &= left - np.uint64(1)
            if here >= size:
                return -_OUTSIDE
            if i == n:
                return -_BITMAP_COUNT
            pos[i] = here
            i += 1
    return 0 if i == n else -_BITMAP_COUNT
