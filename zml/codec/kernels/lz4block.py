"""The LZ4 block format (Collet, lz4_Block_format.md), for index sections: the same bytes that `lz4.block` reads.

Written here so that kernels need not come back to Python for it. The writer is greedy, with one table of 4,096
places; the reader is safe for any bytes.
"""

from typing import Any

import numpy as np
from numba import njit

PLACES = 4096
_LAST_LITERALS = 12  # a match must not start later than this before the end, and ends 5 before it


@njit
def _load32(data: Any, at: int) -> int:
    return (
        np.int64(data[at])
        | (np.int64(data[at + 1]) << 8)
        | (np.int64(data[at + 2]) << 16)
        | (np.int64(data[at + 3]) << 24)
    )


@njit
def _put_length(out: Any, to: int, end: int, length: int) -> int:
    while length >= 255:
        if to >= end:
            return end + 1
        out[to] = 255
        to += 1
        length -= 255
    if to >= end:
        return end + 1
    out[to] = length
    return to + 1


@njit
def _put_sequence(
    data: Any, anchor: int, at: int, out: Any, to: int, end: int, distance: int, length: int
) -> int:
    """Literals [anchor, at), then a match; distance 0: the last literals. Beyond `end` where it does not fit."""
    literals = at - anchor
    if to + 1 + literals + 2 > end:
        return end + 1
    token = to
    to += 1
    if literals >= 15:
        to = _put_length(out, to, end, literals - 15)
        if to + literals + 2 > end:
            return end + 1
    for i in range(literals):
        out[to + i] = data[anchor + i]
    to += literals
    code = min(literals, 15) << 4
    if distance:
        out[to] = distance & 255
        out[to + 1] = distance >> 8
        to += 2
        code |= min(length - 4, 15)
        if length - 4 >= 15:
            to = _put_length(out, to, end, length - 4 - 15)
    out[token] = code
    return to


@njit
def compress(data: Any, start: int, stop: int, out: Any, most: int, places: Any) -> int:
    """Bytes of the block in out[:...], or 0 where it would have more than `most`."""
    for i in range(PLACES):
        places[i] = -1
    at, anchor, to = start, start, 0
    while at < stop - _LAST_LITERALS:
        word = _load32(data, at)
        place = ((word * 2_654_435_761) & 0xFFFF_FFFF) >> 20
        found = np.int64(places[place])
        places[place] = at
        if found < 0 or at - found > 65_535 or _load32(data, found) != word:
            at += 1 + ((at - anchor) >> 6)  # nothing for long: look less often
            continue
        length = 4
        while at + length < stop - 5 and data[found + length] == data[at + length]:
            length += 1
        to = _put_sequence(data, anchor, at, out, to, most, at - found, length)
        if to > most:
            return 0
        at += length
        anchor = at
    to = _put_sequence(data, anchor, stop, out, to, most + 2, 0, 0)
    return to if to <= most else 0


@njit
def decompress(data: Any, at: int, end: int, out: Any, size: int) -> bool:
    """Whether data[at:end] is a block of exactly `size` bytes, which are then in out[:size]."""
    to = 0
    while at < end:
        token = np.int64(data[at])
        at += 1
        literals = token >> 4
        if literals == 15:
            while True:
                if at >= end:
                    return False
                more = np.int64(data[at])
                at += 1
                literals += more
                if more != 255:
                    break
        if literals > end - at or literals > size - to:
            return False
        for i in range(literals):
            out[to + i] = data[at + i]
        at += literals
        to += literals
        if at == end:
            return to == size and token & 15 == 0
        if end - at < 2:
            return False
        distance = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
        at += 2
        length = token & 15
        if length == 15:
            while True:
                if at >= end:
                    return False
                more = np.int64(data[at])
                at += 1
                length += more
                if more != 255:
                    break
        length += 4
        if distance == 0 or distance > to or length > size - to:
            return False
        for i in range(length):
            out[to + i] = out[to + i - distance]
        to += length
    return False
