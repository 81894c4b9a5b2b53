"""From which magnitude on elements are kept, so that a slice keeps about as many as it should.

A slice is what one tensor has in one bucket. Few lines of it tell a floor that certainly more than enough
elements reach; then many lines (or all, and then the answer is exact) are looked at sixteen elements at a time,
and only what reaches the floor is counted, by the bits of its magnitude, which order floats as they order integers.

Samples are whole cache lines: one element costs as much as the sixteen around it. They are taken one from each
stretch of equal length, at a place that a counter of packs moves, so that nothing periodic is seen wrongly for long.
"""

from typing import Any

import numpy as np
from numba import njit

from .bits import above16, bits_of, float_of, trailing_zeros

TINY = np.float32(2.0**-126)  # denormals wait in the residual until they are more
NEVER = np.float32(np.inf)
LINE = 16  # elements
COARSE = 128  # lines that tell the floor
HITS = 256  # kept elements that a sample should have
MOST = 262_144  # elements of a sample
BINS = 2048


@njit
def _mix(a: int, b: int) -> int:
    """A number below 2**31 that looks random (splitmix64)."""
    x = np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
    return np.int64((x ^ (x >> np.uint64(31))) >> np.uint64(33))


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
def _lines(segments: Any, members: Any, a: int, b: int) -> int:
    total = 0
    for m in range(a, b):
        total += segments[members[m], 1] // LINE
    return total


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
    phase: int,
    kept: Any,
) -> int:
    """The magnitudes >= floor in one line of each `stride` (1: all elements) into `kept`; how many."""
    found, room = 0, len(kept) - LINE
    skip = _mix(phase, a) % stride if stride > 1 else 0  # lines until the next one that is looked at
    turn = 0
    for m in range(a, b):
        start, size = segments[members[m], 0], segments[members[m], 1]
        lines = size // LINE
        line = skip
        while line < lines:
            at = start + line * LINE
            mask = above16(residual, values, at, decay, floor)
            while mask and found < room:
                kept[found] = _magnitude(values, residual, at + trailing_zeros(mask), decay)
                mask &= mask - np.uint64(1)
                found += 1
            turn += 1
            line = line + 1 if stride == 1 else line + 1 + _mix(phase + turn, a) % (2 * stride - 1)
        skip = line - lines
        if stride == 1:
            for at in range(start + lines * LINE, start + size):
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
    lines = _lines(segments, members, a, b)
    stride = 1
    if not exact and size > 16_384:
        sample = min(max(HITS * size // wanted, 8_192), MOST)
        stride = max(1, size // sample)
    floor = TINY
    if lines > 4 * COARSE:
        coarse = lines // COARSE
        found = _collect(values, residual, segments, members, a, b, decay, TINY, coarse, phase, kept)
        expected = 3.0 * COARSE * LINE * wanted / size
        rank = np.int64(expected + 4 * np.sqrt(expected)) + 8
        if rank < found:
            floor = max(TINY, float_of(_find(kept, found, rank, counts)))
    found = _collect(values, residual, segments, members, a, b, decay, floor, stride, phase, kept)
    rank = wanted if stride == 1 else max(1, (wanted + stride // 2) // stride)
    if found < rank and floor > TINY:
        found = _collect(values, residual, segments, members, a, b, decay, TINY, stride, phase, kept)
    if found < rank:
        return TINY
    return max(TINY, float_of(_find(kept, found, rank, counts)))
