"""The kernels that Python calls, compiled for one signature each, without the interpreter lock.

pack     a bucket's values and residual -> frames
spread   these frames -> added to a bucket, and where their entries are
apply    a frame -> its entries, all checked; and added to a chunk
"""

from typing import Any

import numpy as np
from numba import njit, types

from .bits import bits_of, sweep64, trailing_zeros
from .frames import HEADER, add_body, put_frame, read_body, stays_finite
from .reasons import OVERFLOW as _OVERFLOW
from .threshold import NEVER, TINY, choose, rank_of, rank_of_kept

BLOCK = 4096
READ, ADD, ADD_FINITE = range(3)
_LOWER = np.float32(0.75)  # than the last threshold the next one will hardly be
_EVERY = 4  # element of a sample of those that reached the last guess
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
    least: int,
    masks: Any,
    pos: Any,
    val: Any,
    n: int,
) -> Any:
    """total = decay * residual + values in [begin, stop), and entries n... for what reaches the floor.

    `room` is how many more may equal the floor, and less `least` how many in all: where many elements are equal,
    the first of them must not keep larger ones from leaving.

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
            while mask:
                here = start + trailing_zeros(mask)
                mask &= mask - np.uint64(1)
                if room <= 0 and (abs(total[here]) <= floor or room <= least):
                    continue
                pos[n] = here - base
                val[n] = total[here]
                n += 1
                room -= 1
        for i in range(at + 64 * words, until):
            if not abs(decay * residual[i] + values[i]) < infinite:
                return n, i
            total[i] = decay * residual[i] + values[i]
            if abs(total[i]) >= floor and (room > 0 or (abs(total[i]) > floor and room > least)):
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
    """Of n entries that reach `floor`, or of all where they are too few, the `wanted` largest; and what about twice as
    many will reach the next time, if it is as now."""
    guess, found = floor, n
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
        return n, floor * _LOWER
    floor = rank_of(val[:n], wanted, kept, counts)
    if not 1.5 * wanted < found < 3 * wanted:
        guess = floor * _LOWER
        if found > 3 * wanted:
            few = n // _EVERY
            for i in range(few):
                kept[i] = bits_of(val[_EVERY * i]) & 0x7FFF_FFFF
            guess = max(guess, rank_of_kept(kept, few, max(1, 2 * wanted // _EVERY), counts))
    many, ties = 0, wanted + 16  # of equal ones not all
    for i in range(n):
        if abs(val[i]) >= floor and (ties > 0 or abs(val[i]) > floor):
            ties -= abs(val[i]) == floor
            pos[many] = pos[i]
            val[many] = val[i]
            many += 1
    return many, guess


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
    """Frames of all chunks into `out`; returns their bytes, or -1 - parameter where an element is not finite.

    total     becomes decay * residual + values - what was sent; it is `residual` itself, but for differences and where
    exact     there is one chunk and at most one slice, of which the largest are found exactly; `residual` stays
    chunks    a row (index, version, base, size, first segment, last) each
    slices    where the segments of slice i begin in `members`; one more than there are slices
    sizes     of each slice, in elements; wanted: of them to be sent
    floors    becomes the threshold of each slice; with `exact` it is a guess, 0 the first time, and becomes the next
    phase     moves the sample
    gain      see `put_frame`; [4]: whether LZ4 is worth trying on more than one chunk;
              [5]: the chunk that is not finite

    Where one is not finite its chunk is as before, where `total` is the residual; the frames of chunks before it are in
    `out`, and their residual has what they left.
    """
    slice_count = len(slices) - 1
    room, least = np.empty(slice_count, np.int64), np.zeros(slice_count + 1, np.int64)
    for i in range(slice_count):
        if exact and wanted[i] > 0 and 0 < floors[i] < NEVER:
            floors[i] = max(TINY, floors[i])
            room[i] = sizes[i]
            continue
        floors[i], room[i] = NEVER, 0
        if not absent[segments[members[slices[i]], 3]] and wanted[i] > 0:
            floors[i] = choose(
                values, residual, segments, members, slices[i], slices[i + 1], sizes[i], wanted[i],
                decay, phase, exact, kept, counts,
            )  # fmt: skip
            room[i], least[i] = 2 * wanted[i] + 16, -6 * wanted[i] - 48
    masks = np.empty(BLOCK // 64, np.uint64)
    at = 0
    for c in range(len(chunks)):
        base, size, first, stop = chunks[c, 2], chunks[c, 3], chunks[c, 4], chunks[c, 5]
        n, bad = 0, np.int64(-1)
        for s in range(first, stop):
            if absent[segments[s, 3]]:
                continue
            begin, end, part = segments[s, 0], segments[s, 0] + segments[s, 1], segments[s, 2]
            before = n
            n, reached = _sweep(
                total, residual, values, begin, end, base, decay,
                NEVER if part < 0 else floors[part], 0 if part < 0 else room[part], least[part],
                masks, pos, val, n,
            )  # fmt: skip
            if part >= 0:
                room[part] -= n - before
            if reached < end:
                bad = s
                if not exact:
                    _undo(total, residual, values, begin, reached, decay)
                break
        if bad >= 0:
            for s in range(first, bad):
                if not exact and not absent[segments[s, 3]]:
                    _undo(total, residual, values, segments[s, 0], segments[s, 0] + segments[s, 1], decay)
            gain[5] = c
            return -1 - segments[bad, 3]
        if exact and slice_count:
            n, floors[0] = _narrow(
                total, segments, first, stop, base, wanted[0], floors[0], pos, val, n, kept, counts
            )
        probe = c == phase % len(chunks)
        if probe:
            tried, squeezed = gain[2], gain[3]
        at, n = put_frame(
            out, at, kind, chunks[c, 0], chunks[c, 1], total, base, size, segments, first, stop, absent,
            pos, val, n, want_index, coding, probe or gain[4] > 0, scratch, places, gain,
        )  # fmt: skip
        for i in range(n):
            total[base + np.int64(pos[i])] -= val[i]
        if probe and gain[2] > tried:
            gain[4] = 1 if gain[3] - squeezed < gain[2] - tried else 0
    return at


@njit(
    types.int64(_BYTES, _TABLE, _TABLE, _F32, _INTS, _POSITIONS, _F32, _BYTES),
    nogil=True,
    cache=True,
)  # fmt: skip
def spread(
    data: Any, chunks: Any, segments: Any, out: Any, places: Any, pos: Any, val: Any, scratch: Any
) -> int:
    """Add what `pack` has written of a bucket to `out`, and say in `places` where its entries are; each may be empty,
    and is left out then. Returns how many entries there are, or the negative of a reason."""
    at, entries = 0, 0
    for c in range(len(chunks) if len(data) else 0):
        base, size, first, stop = chunks[c, 2], chunks[c, 3], chunks[c, 4], chunks[c, 5]
        end = at + HEADER
        for i in range(4):
            end += np.int64(data[at + 12 + i]) << (8 * i)
        n = read_body(data, at + HEADER, end, size, segments, first, stop, base, pos, val, scratch)
        if n < 0:
            return n
        if len(out):
            add_body(data, at + HEADER, segments, first, stop, base, pos, val, n, out)
        if len(places):
            for i in range(n):
                places[entries + i] = base + np.int64(pos[i])
        entries += n
        at = end
    return entries


@njit(
    types.int64(
        _READ, types.int64, _TABLE, types.int64, _F32, _POSITIONS, _F32, _BYTES,
    ),
    nogil=True,
    cache=True,
)  # fmt: skip
def apply(data: Any, size: int, segments: Any, what: int, out: Any, pos: Any, val: Any, scratch: Any) -> int:
    """Check the body of a whole frame of a chunk of `size` elements: its entries, or the negative of a reason.

    ADD adds it to `out`, at least `size` elements; ADD_FINITE refuses what leads beyond what is finite.
    """
    n = read_body(data, HEADER, len(data), size, segments, 0, len(segments), 0, pos, val, scratch)
    if n < 0 or what == READ:
        return n
    if what == ADD_FINITE and not stays_finite(data, HEADER, segments, 0, len(segments), 0, pos, val, n, out):
        return -_OVERFLOW
    add_body(data, HEADER, segments, 0, len(segments), 0, pos, val, n, out)
    return n
