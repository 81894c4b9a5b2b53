"""The sum of what several workers sent for the same chunks, frame after frame, in memory that stays in the cache.

Frame by frame over whole slabs costs 2.7 times as much, because each entry is a cache miss then. Frames are given
by address: who gives them has checked them, and holds their memory. Where a peer has changed one since, it adds
something else, or nothing; nothing is ever written elsewhere.

Importing this module compiles its kernel, or loads it where it was compiled before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import CHUNK, Chunk
from .compiled import carray, compiled, octets, types
from .frame import Buffer
from .kernels.frames import HEADER, add_body, read_body
from .sparse import TopK

ADDRESS, BYTES = 0, 1  # columns of a frame's row; (0, 0) where there is no frame

Rows = NDArray[np.int64]

_F32, _INTS = types.float32[::1], types.int64[:, ::1]


class Sums:
    """Sums frames of `topk` for chunks in a fixed order. One thread uses it at a time."""

    def __init__(self, codec: TopK, chunks: Sequence[Chunk]) -> None:
        self._scratch = codec.scratch
        tables = [codec.table(chunk).segments for chunk in chunks]
        ends = np.cumsum([len(table) for table in tables], dtype=np.int64)
        self._segments = np.concatenate([np.zeros((0, 4), np.int64), *tables])
        self._chunks = np.array(
            [
                (chunk.size, end - len(table), end)
                for chunk, table, end in zip(chunks, tables, ends.tolist(), strict=True)
            ],
            np.int64,
        ).reshape(-1, 3)

    def row(self, frame: Buffer) -> tuple[int, int]:
        """Where a frame lies, and how long it is. It must be held for as long as the row is used."""
        address: int = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
        return address, len(frame)

    def take(self, first: int, last: int, frames: Rows, out: NDArray[np.float32]) -> NDArray[np.int64]:
        """Set out[i * CHUNK:] to the sum for the i-th of chunks[first:last]: of frames[first + i], row by row.

        Returns how many entries each sum has; elements of vectors are none.
        """
        assert frames.shape[0] == len(self._chunks) and frames.shape[2] == 2
        assert len(out) >= (last - first) * CHUNK
        scratch, entries = self._scratch, np.zeros(last - first, np.int64)
        _sum(
            frames[first:last],
            self._chunks[first:last],
            self._segments,
            out,
            entries,
            scratch.pos,
            scratch.val,
            scratch.bytes,
        )
        return entries


# -- the kernel --------------------------------------------------------------------------------------------


@compiled(
    types.int64[:, :, ::1],
    _INTS,
    _INTS,
    _F32,
    types.int64[::1],
    types.uint16[::1],
    _F32,
    types.uint8[::1],
)
def _sum(
    frames: Any, chunks: Any, segments: Any, sums: Any, entries: Any, pos: Any, val: Any, scratch: Any
) -> None:
    for c in range(len(chunks)):
        size, first, last = chunks[c, 0], chunks[c, 1], chunks[c, 2]
        out = sums[c * CHUNK : c * CHUNK + size]
        out[:] = np.float32(0)
        for f in range(frames.shape[1]):
            length = frames[c, f, BYTES]
            if length < HEADER:
                continue
            data = carray(octets(frames[c, f, ADDRESS]), length)
            n = read_body(data, HEADER, length, size, segments, first, last, 0, pos, val, scratch)
            if n >= 0:
                entries[c] += n
                add_body(data, HEADER, segments, first, last, 0, pos, val, n, out)
