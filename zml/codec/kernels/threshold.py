"""From which magnitude on elements are kept, so that a slice keeps about as many as it should.

A slice is what one tensor has in one bucket. Few lines of it tell a floor that certainly more than enough
elements reach; then many lines (or all, and then the answer is exact) are looked at sixteen elements at a time,
and only what reaches the floor is counted, by the bits of its magnitude, which order floats as they order integers.

Samples are whole cache lines: one element costs as much as the sixteen around it; where many are needed they are
runs of four, or the processor fetches the neighbours in vain. One is taken from each stretch of equal length, at a
place that a counter of packs moves, so that nothing periodic is seen wrongly for long.
"""

from typing import Any

import numpy as np
from numba import njit

from .bits import above16, bits_of, fetch, float_of, trailing_zeros

TINY = np.float32(2.0**-126)  # denormals wait in the residual until they are more
NEVER = np.float32(np.inf)
LINE = 16  # elements
SMALL = 16_384  # elements of a slice that is always looked at as a whole
COARSE = 128  # lines that tell the floor
AHEAD = 24  # lines that are asked for before they are needed
BINS = 2048


@njit
def _place(turn: int, stride: int, phase: int) -> int:
    """A place in this stretch of `stride` places, one that looks random (the multiplier of MurmurHash's finisher)."""
    if stride == 1:
        return turn
    x = (np.uint64(turn) + np.uint64(phase) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return turn * stride + np.int64(((x >> np.uint64(33)) * np.uint64(stride)) >> np.uint64(31))


@njit
def _magnitude(values: Any, residual: Any, at: int, decay: Any) -> int:
    return bits_of(decay * residual[at] + values[at]) & 0x7FFF_FFFF


@njit
def _find(kept: Any, n: int, rank: int, counts: Any) -> int:
    """The rank-th largest (from 1) of kept[:n], which loses its order."""
    for shift in (20, 9, 0):
        bins = 512 if shift == 0 else BINS
        for i in range(bins):
            counts[i] = 0
        for i in range(n):
            counts[(kept[i] >> shift) & (bins - 1)] += 1
        chosen = bins - 1
        while np.int64(counts[chosen]) < rank:
            rank -= np.int64(counts[chosen])
            chosen -= 1
        if counts[chosen] == n and shift == 0:
            return np.int64(kept[0])
        many = 0
        for i in range(n):
            if (kept[i] >> shift) & (bins - 1) == chosen:
                kept[many] = kept[i]
                many += 1
        n = many
    return np.int64(kept[0])


@njit
def rank_of_kept(kept: Any, n: int, rank: int, counts: Any) -> Any:
    """The rank-th largest magnitude, from 1, of n whose bits are in `kept`, which lose their order."""
    return float_of(_find(kept, n, rank, counts))


@njit
def rank_of(val: Any, rank: int, kept: Any, counts: Any) -> Any:
    """The rank-th largest magnitude of val, from 1."""
    for i in range(len(val)):
        kept[i] = bits_of(val[i]) & 0x7FFF_FFFF
    return float_of(_find(kept, len(val), rank, counts))


@njit
def _collect(
    values: Any,
    residual: Any,
    segments: Any,
    members: Any,
    a: int,
    b: int,
    decay: Any,
    floor: Any,
    stride: int,
    run: int,
    phase: int,
    kept: Any,
) -> int:
    """The magnitudes >= floor into `kept`, and how many: of `run` lines in each `stride` runs, or (1) of all."""
    found, room, width = 0, len(kept) - LINE, run * LINE
    turn, passed = 0, 0  # the stretch that is looked at, and runs of former segments
    for m in range(a, b):
        start, size = segments[members[m], 0], segments[members[m], 1]
        runs = size // width
        place = _place(turn, stride, phase) - passed
        while place < runs:
            if stride > 1:
                ahead = start + (_place(turn + AHEAD, stride, phase) - passed) * width
                for at in range(ahead, ahead + width, LINE):
                    fetch(values, at)
                    fetch(residual, at)
            for at in range(start + place * width, start + (place + 1) * width, LINE):
                mask = above16(residual, values, at, decay, floor)
                while mask and found < room:
                    kept[found] = _magnitude(values, residual, at + trailing_zeros(mask), decay)
                    mask &= mask - np.uint64(1)
                    found += 1
            turn += 1
            place = _place(turn, stride, phase) - passed
        passed += runs
        if stride == 1:
            turn = passed
            for at in range(start + runs * width, start + size):
                bits = _magnitude(values, residual, at, decay)
                if bits >= bits_of(floor) and found < room:
                    kept[found] = bits
                    found += 1
    return found


@njit
def choose(
    values: Any,
    residual: Any,
    segments: Any,
    members: Any,
    a: int,
    b: int,
    size: int,
    wanted: int,
    decay: Any,
    phase: int,
    exact: bool,
    kept: Any,
    counts: Any,
) -> Any:
    """The threshold for `wanted` of the `size` elements in segments[members[a:b]], never below TINY."""
    if wanted <= 0:
        return NEVER
    if wanted >= size:
        return TINY
    floor, stride, run = TINY, 1, 1
    if not exact and size > SMALL:
        # Enough kept elements in the sample where that is cheap; fewer where it would be a large part of all.
        stride = wanted // 256
        if stride < 16:
            stride = min(16, wanted // 128)
        if stride < 8:
            stride = max(1, min(8, wanted // 48))
        run = 4 if 1 < stride <= 32 else 1
    look, lines, rank = stride, run, (wanted + stride // 2) // stride
    first = size > 4 * COARSE * LINE
    if first:  # a floor that more than enough elements reach
        expected = 3.0 * COARSE * LINE * wanted / size
        look, lines, rank = size // (COARSE * LINE), 1, np.int64(expected + 4 * np.sqrt(expected)) + 8
    while True:
        found = _collect(values, residual, segments, members, a, b, decay, floor, look, lines, phase, kept)
        if found < rank and not first and floor > TINY:  # it was too high
            floor = TINY
            continue
        if found >= rank:
            floor = max(TINY, float_of(_find(kept, found, rank, counts)))
        else:
            floor = TINY
        if not first:
            return floor
        first, look, lines, rank = False, stride, run, (wanted + stride // 2) // stride
