"""One chunk's frame: written from chosen entries, read, checked and added.

    header 16 bytes (see zml.codec.frame)
    bfloat16 of every element of a vector (a parameter with less than two dimensions), in order
    and, if the chunk has other elements:
        codings u8    index coding | value coding << 3 | LZ4 << 6
        entries u24
        index section; with LZ4: its size u24, then a block
        value section

`segments` has a row (start, size, slice, parameter) per segment, in order; a slice below 0 marks a vector. Starts
count from the beginning of the buffer given, chunks begin at `base`. Nothing is written before all is checked.
"""

from typing import Any

import numpy as np
from numba import njit

from . import reasons
from .bits import bits_of, float_of
from .indices import (
    BITMAP,
    DENSE,
    GAP8,
    OFF12,
    RICE,
    fits_off12,
    get_bitmap,
    get_gap8,
    get_off12,
    get_rice,
    most_bytes,
    put_bitmap,
    put_gap8,
    put_off12,
    put_rice,
    size_rice,
)
from .lz4block import compress, decompress
from .values import BITS, bf16_bits, get_values, put_values, value_bytes

HEADER = 16
CODEC = 2
LZ4 = 64
AUTO = -1

_DENSE_SHORT, _DENSE_LONG, _DENSE_VALUE = reasons.DENSE_SHORT, reasons.DENSE_LONG, reasons.DENSE_VALUE
_HEAD_SHORT, _INDEX_CODING, _VALUE_CODING = reasons.HEAD_SHORT, reasons.INDEX_CODING, reasons.VALUE_CODING
_RESERVED, _COUNT, _NOTHING = reasons.RESERVED, reasons.COUNT, reasons.NOTHING
_VALUES_SHORT, _NOT_ALL, _DENSE_INDEX = reasons.VALUES_SHORT, reasons.NOT_ALL, reasons.DENSE_INDEX
_LZ4_SIZE, _LZ4_BLOCK, _FOREIGN = reasons.LZ4_SIZE, reasons.LZ4_BLOCK, reasons.FOREIGN
_OVERFLOW = reasons.OVERFLOW


@njit
def put32(out: Any, at: int, number: int) -> None:
    for i in range(4):
        out[at + i] = (number >> (8 * i)) & 255


@njit
def vector_elements(segments: Any, first: int, last: int) -> int:
    total = 0
    for s in range(first, last):
        if segments[s, 2] < 0:
            total += segments[s, 1]
    return total


@njit
def all_positions(segments: Any, first: int, last: int, base: int, pos: Any) -> int:
    """The positions of every element outside of vectors."""
    n = 0
    for s in range(first, last):
        if segments[s, 2] >= 0:
            start = segments[s, 0] - base
            for i in range(start, start + segments[s, 1]):
                pos[n] = i
                n += 1
    return n


@njit
def _index_coding(wanted: int, bits: int, pos: Any, n: int, size: int, sparse: int) -> int:
    if wanted == DENSE or (wanted == AUTO and 3 * n > sparse and bits <= 4):
        return DENSE
    if wanted == AUTO:
        if n * bits + size > sparse * bits:
            return DENSE
        if 8 * n >= size:
            return BITMAP
        if 250 * n >= size:
            return GAP8
        wanted = OFF12
        if (size + 4095) // 4096 + (3 * n + 1) // 2 > size_rice(pos, n, size):
            wanted = RICE
    return RICE if wanted == OFF12 and not fits_off12(pos, n) else wanted


@njit
def _put_index(coding: int, pos: Any, n: int, size: int, out: Any, at: int) -> int:
    if coding == GAP8:
        return put_gap8(pos, n, out, at)
    if coding == OFF12:
        return put_off12(pos, n, size, out, at)
    if coding == RICE:
        return put_rice(pos, n, size, out, at)
    if coding == BITMAP:
        return put_bitmap(pos, n, size, out, at)
    return at


@njit
def put_frame(
    out: Any,
    at: int,
    kind: int,
    chunk: int,
    version: int,
    total: Any,
    base: int,
    size: int,
    segments: Any,
    first: int,
    last: int,
    absent: Any,
    pos: Any,
    val: Any,
    n: int,
    want_index: int,
    coding: int,
    squeeze: bool,
    scratch: Any,
    places: Any,
    gain: Any,
) -> Any:
    """Write the frame of the entries (pos, val)[:n] and of the vectors in `total`; where it ends, and its entries.

    val becomes what a reader will find, which the caller subtracts from what is left; vectors are subtracted from
    `total` here. Where every element is sent there are more entries than were given. `gain` counts the bytes of
    index sections before and after LZ4, and of those that LZ4 was tried on, before and after.
    """
    begin = at
    at += HEADER
    sparse = 0
    for s in range(first, last):
        if segments[s, 2] >= 0:
            sparse += segments[s, 1]
            continue
        silent = absent[segments[s, 3]]
        for i in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
            short = 0
            if not silent:
                short = bf16_bits(bits_of(total[i]))
                total[i] -= float_of(short << 16)
            out[at] = short & 255
            out[at + 1] = short >> 8
            at += 2
    if sparse:
        index = GAP8
        if n:
            index = _index_coding(want_index, BITS[coding], pos, n, size, sparse)
        if index == DENSE:
            n = all_positions(segments, first, last, base, pos)
            i = 0
            for s in range(first, last):
                if segments[s, 2] >= 0:
                    silent = absent[segments[s, 3]]
                    for here in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
                        val[i] = np.float32(0) if silent else total[here]
                        i += 1
        head = at
        at += 4
        squeezed = False
        if n:
            start = at
            at = _put_index(index, pos, n, size, out, at)
            raw = at - start
            gain[0] += raw
            if squeeze and raw >= 64:
                short = compress(out, start, at, scratch, raw - 3 - (3 * raw + 99) // 100, places)
                gain[2] += raw
                gain[3] += short + 3 if short else raw
                if short:
                    squeezed = True
                    out[start] = raw & 255
                    out[start + 1] = (raw >> 8) & 255
                    out[start + 2] = raw >> 16
                    for i in range(short):
                        out[start + 3 + i] = scratch[i]
                    at = start + 3 + short
            gain[1] += at - start
            at = put_values(coding, index == DENSE, val, n, out, at, scratch)
        out[head] = (index | (coding << 3) | (LZ4 if squeezed else 0)) if n else 0
        out[head + 1] = n & 255
        out[head + 2] = (n >> 8) & 255
        out[head + 3] = n >> 16
    out[begin] = CODEC
    out[begin + 1] = kind
    out[begin + 2] = 0
    out[begin + 3] = 0
    put32(out, begin + 4, chunk)
    put32(out, begin + 8, version)
    put32(out, begin + 12, at - begin - HEADER)
    return at, n


@njit
def read_body(
    data: Any,
    at: int,
    end: int,
    size: int,
    segments: Any,
    first: int,
    last: int,
    base: int,
    pos: Any,
    val: Any,
    scratch: Any,
) -> int:
    """Check a body and read its entries into (pos, val): how many, or the negative of a reason."""
    vectors = vector_elements(segments, first, last)
    if end - at < 2 * vectors:
        return -_DENSE_SHORT
    for i in range(vectors):
        if (data[at + 2 * i + 1] & 0x7F) == 0x7F and data[at + 2 * i] & 0x80:
            return -_DENSE_VALUE
    at += 2 * vectors
    sparse = size - vectors
    if sparse == 0:
        return 0 if at == end else -_DENSE_LONG
    if end - at < 4:
        return -_HEAD_SHORT
    head = np.int64(data[at])
    n = np.int64(data[at + 1]) | (np.int64(data[at + 2]) << 8) | (np.int64(data[at + 3]) << 16)
    at += 4
    index, coding = head & 7, (head >> 3) & 7
    if n == 0:
        return 0 if head == 0 and at == end else -_NOTHING
    if head & 128:
        return -_RESERVED
    if index > DENSE:
        return -_INDEX_CODING
    if coding >= len(BITS):
        return -_VALUE_CODING
    if n > sparse:
        return -_COUNT
    dense = index == DENSE
    middle = end - value_bytes(coding, n, dense)
    if middle < at:
        return -_VALUES_SHORT
    if dense:
        if n != sparse:
            return -_NOT_ALL
        if at != middle or head & LZ4:
            return -_DENSE_INDEX
        all_positions(segments, first, last, base, pos)
    else:
        found = _read_positions(data, at, middle, index, head & LZ4 != 0, n, size, pos, scratch)
        if found < 0:
            return found
        if vectors:
            i = 0
            for s in range(first, last):
                stop = segments[s, 0] + segments[s, 1] - base
                if segments[s, 2] < 0 and i < n and pos[i] < stop:
                    return -_FOREIGN
                while i < n and pos[i] < stop:
                    i += 1
    found = get_values(coding, dense, data, middle, n, val)
    return found if found < 0 else n


@njit
def _read_positions(
    data: Any, at: int, end: int, index: int, squeezed: bool, n: int, size: int, pos: Any, scratch: Any
) -> int:
    if squeezed:
        if end - at < 3:
            return -_LZ4_SIZE
        raw = np.int64(data[at]) | (np.int64(data[at + 1]) << 8) | (np.int64(data[at + 2]) << 16)
        if raw > most_bytes(index, n, size) or raw > len(scratch):
            return -_LZ4_SIZE
        if not decompress(data, at + 3, end, scratch, raw):
            return -_LZ4_BLOCK
        return _positions(scratch, 0, raw, index, n, size, pos)
    return _positions(data, at, end, index, n, size, pos)


@njit
def _positions(data: Any, at: int, end: int, index: int, n: int, size: int, pos: Any) -> int:
    if index == GAP8:
        return get_gap8(data, at, end, n, size, pos)
    if index == OFF12:
        return get_off12(data, at, end, n, size, pos)
    if index == RICE:
        return get_rice(data, at, end, n, size, pos)
    return get_bitmap(data, at, end, n, size, pos)


@njit
def add_body(
    data: Any, at: int, segments: Any, first: int, last: int, base: int, pos: Any, val: Any, n: int, out: Any
) -> None:
    """Add what `read_body` has read and checked."""
    for s in range(first, last):
        if segments[s, 2] < 0:
            for i in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
                out[i] += float_of((np.int64(data[at]) | (np.int64(data[at + 1]) << 8)) << 16)
                at += 2
    for i in range(n):
        out[base + np.int64(pos[i])] += val[i]


@njit
def stays_finite(
    data: Any, at: int, segments: Any, first: int, last: int, base: int, pos: Any, val: Any, n: int, out: Any
) -> bool:
    """Whether `add_body` would leave every element that it changes finite."""
    most = np.float32(np.inf)
    for s in range(first, last):
        if segments[s, 2] < 0:
            for i in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
                short = np.int64(data[at]) | (np.int64(data[at + 1]) << 8)
                if not abs(out[i] + float_of(short << 16)) < most:
                    return False
                at += 2
    for i in range(n):
        if not abs(out[base + np.int64(pos[i])] + val[i]) < most:
            return False
    return True
