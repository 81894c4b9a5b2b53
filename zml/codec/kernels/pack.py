"""The kernels that Python calls, compiled for one signature each, without the interpreter lock.

pack     a bucket's values and residual -> frames
restore  what `pack` did, undone
read     a frame -> its entries, all checked
apply    a frame, all checked, added to a chunk
add      the same for a frame that was checked before: fast, safe for any bytes, but what is wrong may be half done
"""

from typing import Any

import numpy as np
from numba import njit, types

from .bits import sweep64, trailing_zeros
from .frames import HEADER, add_body, put_frame, read_body, stays_finite
from .reasons import OVERFLOW as _OVERFLOW
from .threshold import NEVER, TINY, choose, rank_of

BLOCK = 4096
_LOWER = np.float32(0.75)  # than the last threshold the next one will hardly be
CHUNK = 65_536

_F32 = types.float32[::1]
_BYTES = types.uint8[::1]
_READ = types.Array(types.uint8, 1, "C", readonly=True)
_TABLE = types.int64[:, ::1]
_INTS = types.int64[::1]
_POSITIONS = types.uint16[::1]


@njit
def _undo(total: Any, residual: Any, values: Any, a: int, b: int, decay: Any) -> None:
    for i in range(a, b):
        residual[i] = (total[i] - values[i]) / decay


@njit
def _undo_frame(
    data: Any,
    at: int,
    residual: Any,
    values: Any,
    size: int,
    segments: Any,
    first: int,
    last: int,
    base: int,
    absent: Any,
    decay: Any,
    pos: Any,
    val: Any,
    scratch: Any,
) -> int:
    """Take a frame of our own back; where the next begins."""
    at += HEADER
    end = at
    for i in range(4):
        end += np.int64(data[at - 4 + i]) << (8 * i)
    n = read_body(data, at, end, size, segments, first, last, base, pos, val, scratch)
    add_body(data, at, segments, first, last, base, pos, val, n, residual)
    for s in range(first, last):
        if not absent[segments[s, 3]]:
            _undo(residual, residual, values, segments[s, 0], segments[s, 0] + segments[s, 1], decay)
    return end


@njit
def _sweep(
    total: Any,
    residual: Any,
    values: Any,
    begin: int,
    stop: int,
    base: int,
    decay: Any,
    floor: Any,
    room: int,
    masks: Any,
    pos: Any,
    val: Any,
    n: int,
) -> Any:
    """total = decay * residual + values in [begin, stop), and entries n... for what reaches the floor.

    Returns how many entries there are now, and where the first element is that would not be finite (or `stop`).
    No element from there on has been written.
    """
    at = begin
    infinite = np.float32(np.inf)
    while at < stop:
        until = min(stop, base + ((at - base) // BLOCK + 1) * BLOCK)
        words = (until - at) // 64
        for word in range(words):
            if sweep64(total, residual, values, at + 64 * word, decay, floor, masks, word):
                return n, at + 64 * word
        for word in range(words):
            mask = masks[word]
            start = at + 64 * word
            while mask and room > 0:
                here = start + trailing_zeros(mask)
                mask &= mask - np.uint64(1)
                pos[n] = here - base
                val[n] = total[here]
                n += 1
                room -= 1
        for i in range(at + 64 * words, until):
            if not abs(decay * residual[i] + values[i]) < infinite:
                return n, i
            total[i] = decay * residual[i] + values[i]
            if abs(total[i]) >= floor and room > 0:
                pos[n] = i - base
                val[n] = total[i]
                n += 1
                room -= 1
        at = until
    return n, stop


@njit
def _narrow(
    total: Any,
    segments: Any,
    first: int,
    last: int,
    base: int,
    wanted: int,
    floor: Any,
    pos: Any,
    val: Any,
    n: int,
    kept: Any,
    counts: Any,
) -> Any:
    """Of n entries that reach `floor`, or of all where they are too few, the `wanted` largest; and their least."""
    if n < wanted and floor > TINY:
        n, floor = 0, TINY
        for s in range(first, last):
            if segments[s, 2] >= 0:
                for i in range(segments[s, 0], segments[s, 0] + segments[s, 1]):
                    if abs(total[i]) >= TINY:
                        pos[n] = i - base
                        val[n] = total[i]
                        n += 1
    if n <= wanted:
        return n, floor
    floor = rank_of(val[:n], wanted, kept, counts)
    many = 0
    for i in range(n):
        if abs(val[i]) >= floor and many < 2 * wanted + 16:  # where many are equal
            pos[many] = pos[i]
            val[many] = val[i]
            many += 1
    return many, floor


@njit(
    types.int64(
        _F32, _F32, _F32, _TABLE, _TABLE, _INTS, _INTS, _INTS, _INTS, _F32, types.boolean[::1],
        types.float32, types.int64, types.int64, types.int64, types.int64, types.boolean,
        _BYTES, _POSITIONS, _F32, _BYTES, types.uint32[::1], types.uint32[::1], types.int32[::1], _INTS,
    ),
    nogil=True,
    cache=True,
)  # fmt: skip
def pack(
    total: Any,
    residual: Any,
    values: Any,
    chunks: Any,
    segments: Any,
    slices: Any,
    members: Any,
    sizes: Any,
    wanted: Any,
    floors: Any,
    absent: Any,
    decay: Any,
    phase: int,
    kind: int,
    want_index: int,
    coding: int,
    exact: bool,
    out: Any,
    pos: Any,
    val: Any,
    scratch: Any,
    kept: Any,
    counts: Any,
    places: Any,
    gain: Any,
) -> int:
    """Frames of all chunks into `out`; returns their bytes, or -1 - parameter where one is not finite.

    total     becomes decay * residual + values - what was sent; it is `residual` itself, but where
    exact     there is one chunk and at most one slice, of which the largest are found exactly; `residual` stays
    chunks    a row (index, version, base, size, first segment, last) each
    slices    where the segments of slice i begin in `members`; one more than there are slices
    sizes     of each slice, in elements; wanted: of them to be sent
    floors    becomes the threshold of each slice; with `exact` it is what it was the last time, 0 the first time
    phase     moves the sample; gain[4]: whether LZ4 is worth trying beyond one chunk
    """
    slice_count = len(slices) - 1
    room = np.empty(slice_count, np.int64)
    for i in range(slice_count):
        if exact and wanted[i] > 0 and 0 < floors[i] < NEVER:
            floors[i] = max(TINY, floors[i] * _LOWER)
            room[i] = sizes[i]
            continue
        floors[i] = NEVER
        if not absent[segments[members[slices[i]], 3]]:
            floors[i] = choose(
                values, residual, segments, members, slices[i], slices[i + 1], sizes[i], wanted[i],
                decay, phase, exact, kept, counts,
            )  # fmt: skip
        room[i] = 2 * wanted[i] + 16 if wanted[i] > 0 else 0
    masks = np.empty(BLOCK // 64, np.uint64)
    vector_floor = np.float32(np.inf)
    at = 0
    for c in range(len(chunks)):
        base, size, first, last = chunks[c, 2], chunks[c, 3], chunks[c, 4], chunks[c, 5]
        n, bad = 0, np.int64(-1)
        for s in range(first, last):
            if absent[segments[s, 3]]:
                continue
            begin, stop, part = segments[s, 0], segments[s, 0] + segments[s, 1], segments[s, 2]
            before = n
            n, reached = _sweep(
                total, residual, values, begin, stop, base, decay,
                vector_floor if part < 0 else floors[part], 0 if part < 0 else room[part], masks, pos, val, n,
            )  # fmt: skip
            if part >= 0:
                room[part] -= n - before
            if reached < stop:
                bad = s
                if not exact:
                    _undo(total, residual, values, begin, reached, decay)
                break
        if bad >= 0 and exact:
            return -1 - segments[bad, 3]
        if bad >= 0:
            for s in range(first, bad):
                if not absent[segments[s, 3]]:
                    _undo(total, residual, values, segments[s, 0], segments[s, 0] + segments[s, 1], decay)
            at = 0
            for b in range(c):
                at = _undo_frame(
                    out, at, residual, values, chunks[b, 3], segments, chunks[b, 4], chunks[b, 5], chunks[b, 2],
                    absent, decay, pos, val, scratch,
                )  # fmt: skip
            return -1 - segments[bad, 3]
        if exact and slice_count:
            n, floors[0] = _narrow(
                total, segments, first, last, base, wanted[0], floors[0], pos, val, n, kept, counts
            )
        probe = c == phase % len(chunks)
        if probe:
            tried, squeezed = gain[2], gain[3]
        at = put_frame(
            out, at, kind, chunks[c, 0], chunks[c, 1], total, base, size, segments, first, last, absent,
            pos, val, n, want_index, coding, probe or gain[4] > 0, scratch, places, gain,
        )  # fmt: skip
        if probe and gain[2] > tried:
            gain[4] = 1 if gain[3] - squeezed < gain[2] - tried else 0
    return at


@njit(
    types.void(
        _READ, _F32, _F32, _TABLE, _TABLE, types.boolean[::1], types.float32, _POSITIONS, _F32, _BYTES,
    ),
    nogil=True,
    cache=True,
)  # fmt: skip
def restore(
    data: Any,
    residual: Any,
    values: Any,
    chunks: Any,
    segments: Any,
    absent: Any,
    decay: Any,
    pos: Any,
    val: Any,
    scratch: Any,
) -> None:
    """The residual as it was before the frames in `data` were packed from it, up to rounding."""
    at = 0
    for c in range(len(chunks)):
        at = _undo_frame(
            data, at, residual, values, chunks[c, 3], segments, chunks[c, 4], chunks[c, 5], chunks[c, 2],
            absent, decay, pos, val, scratch,
        )  # fmt: skip


@njit(types.int64(_READ, types.int64, _TABLE, _POSITIONS, _F32, _BYTES), nogil=True, cache=True)
def read(data: Any, size: int, segments: Any, pos: Any, val: Any, scratch: Any) -> int:
    """Check the body of a whole frame of a chunk of `size` elements: its entries, or the negative of a reason."""
    return read_body(data, HEADER, len(data), size, segments, 0, len(segments), 0, pos, val, scratch)


@njit(
    types.int64(_READ, types.int64, _TABLE, _F32, types.boolean, _POSITIONS, _F32, _BYTES),
    nogil=True,
    cache=True,
)
def apply(
    data: Any, size: int, segments: Any, out: Any, finite: bool, pos: Any, val: Any, scratch: Any
) -> int:
    """`read`, then add to `out`; with `finite` refused where that leads beyond what is finite."""
    n = read_body(data, HEADER, len(data), size, segments, 0, len(segments), 0, pos, val, scratch)
    if n < 0:
        return n
    if finite and not stays_finite(data, HEADER, segments, 0, len(segments), 0, pos, val, n, out):
        return -_OVERFLOW
    add_body(data, HEADER, segments, 0, len(segments), 0, pos, val, n, out)
    return n


@njit(types.int64(_READ, types.int64, _TABLE, _F32, _POSITIONS, _F32, _BYTES), nogil=True, cache=True)
def add(data: Any, size: int, segments: Any, out: Any, pos: Any, val: Any, scratch: Any) -> int:
    """Add the body of a frame that was checked before to `out`, at least `size` elements."""
    if len(out) < size or len(data) < HEADER:
        return -1
    n = read_body(data, HEADER, len(data), size, segments, 0, len(segments), 0, pos, val, scratch)
    if n >= 0:
        add_body(data, HEADER, segments, 0, len(segments), 0, pos, val, n, out)
    return n


READY = True
