"""What a shard publishes of the chunks of a bucket, in one call: their deltas, and what replicas will hold then.

To choose, write and add the delta of one chunk at 1 % takes about as long as it takes Python to ask for it
(`python bench/shard_step.py --delta 0.01`).

w and p are given by address: who gives them holds their memory. Importing this module compiles its kernel, or loads it
where it was compiled before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..layout import Chunk
from .behind import Behind
from .compiled import carray, compiled, floats, types
from .dense import write_parameters
from .frame import Kind
from .kernels.pack import ADD_FINITE, apply, pack
from .sparse import DIFFERENCE, Table, TopK, frame_bound

INDEX, BASE, SIZE, W, P, SEGMENT, SEGMENTS, MEMBER, MEMBERS = range(9)  # columns of a chunk's row
COLUMNS = 9
DELTA = int(Kind.DELTA)


class _Tables:
    """What is the same of some chunks at every call."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables
        self.segments = np.concatenate([table.segments for table in tables])
        self.members = np.concatenate([table.members for table in tables])
        self.sizes = np.concatenate([table.sizes for table in tables])
        self.wanted = np.zeros(len(tables), np.int64)
        self.floors = np.zeros(len(tables), np.float32)  # of the last deltas; guesses for the next
        self.rows = np.zeros((len(tables), COLUMNS), np.int64)
        segment = member = 0
        for row, table in zip(self.rows, tables, strict=True):
            row[INDEX], row[SIZE] = table.chunk.index, table.chunk.size
            row[SEGMENT], row[MEMBER] = segment, member
            segment, member = segment + len(table.segments), member + len(table.members)
            row[SEGMENTS], row[MEMBERS] = segment, member
        self.tensors: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = []
        self.lengths = np.zeros(len(tables), np.int64)
        self.absent = np.zeros(max(len(table.segments) for table in tables), np.bool_)  # none ever is

    def lie_at(self, tensors: list[tuple[Tensor, Tensor]]) -> None:
        """w and p of each chunk: mostly those of before. Their objects are not looked into then, which has a cost while
        the caches are full of parameters."""
        if len(self.tensors) == len(tensors) and all(
            w is w_before() and p is p_before()
            for (w, p), (w_before, p_before) in zip(tensors, self.tensors, strict=True)
        ):
            return
        for row, (w, p) in zip(self.rows, tensors, strict=True):
            assert w.numel() == p.numel() == row[SIZE] and w.is_contiguous() and p.is_contiguous()
            row[W], row[P] = w.data_ptr(), p.data_ptr()
        self.tensors = [(weakref.ref(w), weakref.ref(p)) for w, p in tensors]


class Deltas:
    """A codec's. One thread uses it at a time."""

    def __init__(self, codec: TopK) -> None:
        self._codec = codec
        self._known: dict[tuple[int, ...], _Tables] = {}
        self._out = np.empty(0, np.uint8)  # pages are touched when they are first written
        self._made = 0  # deltas, ever: it moves the sample
        self._gain = np.zeros(6, np.int64)

    def publish(self, behind: Sequence[Behind]) -> list[bytes]:
        """The frames of some chunks, each of which is there once; every p becomes what replicas will then hold. Mostly
        they are deltas; where no finite one leads to w, the parameters themselves."""
        given = self._tables([each.chunk for each in behind])
        room = sum(frame_bound(each.chunk.size) for each in behind)
        if len(self._out) < room:
            self._out = np.empty(room, np.uint8)
        given.lie_at([(each.w, each.p) for each in behind])
        given.rows[:, BASE] = [each.base for each in behind]
        np.minimum([max(each.budget, 0) for each in behind], given.sizes, out=given.wanted)
        self._gain[:4] = 0
        scratch = self._codec.scratch
        _publish(
            given.rows,
            given.segments,
            given.members,
            given.sizes,
            given.wanted,
            given.floors,
            given.absent,
            self._made,
            self._codec.index_coding,
            self._codec.value_coding,
            given.lengths,
            self._out,
            scratch.total,
            *scratch.packing,
            self._gain,
        )
        self._made += len(behind)
        self._codec.note(self._gain)
        frames: list[bytes] = []
        at = 0
        for each, length in zip(behind, given.lengths.tolist(), strict=True):
            if length < 0:  # no finite delta leads there, or back
                each.p.copy_(each.w)
                frames.append(write_parameters(each.chunk, each.p, each.version))
            else:
                frames.append(self._out[at : at + length].tobytes())
                at += length
        return frames

    def _tables(self, chunks: Sequence[Chunk]) -> _Tables:
        key = tuple(chunk.index for chunk in chunks)
        tables = [self._codec.table(chunk) for chunk in chunks]
        known = self._known.get(key)
        if known is None or any(a is not b for a, b in zip(known.tables, tables, strict=True)):
            if len(self._known) > len(self._codec.tables):  # mostly the same few buckets are asked for
                self._known.clear()
            known = self._known[key] = _Tables(tables)
        return known


# -- the kernel --------------------------------------------------------------------------------------------

_F32, _BYTES, _INTS, _ROWS = (
    types.float32[::1],
    types.uint8[::1],
    types.int64[::1],
    types.int64[:, ::1],
)


@compiled(
    _ROWS, _ROWS, _INTS, _INTS, _INTS, _F32, types.boolean[::1], types.int64, types.int64, types.int64, _INTS, _BYTES,
    _F32, types.uint16[::1], _F32, _BYTES, types.uint32[::1], types.uint32[::1], types.int32[::1], _INTS,
)  # fmt: skip
def _publish(
    rows: Any,
    segments: Any,
    members: Any,
    sizes: Any,
    wanted: Any,
    guesses: Any,
    absent: Any,
    phase: int,
    index_coding: int,
    value_coding: int,
    lengths: Any,
    out: Any,
    total: Any,
    pos: Any,
    val: Any,
    scratch: Any,
    kept: Any,
    counts: Any,
    places: Any,
    gain: Any,
) -> None:
    """One frame after another into `out`, each added to its p; into `lengths` their bytes, -1 where there is none."""
    table, slices = np.zeros((1, 6), np.int64), np.zeros(2, np.int64)
    at = 0
    for c in range(len(rows)):
        size = rows[c, SIZE]
        w, p = carray(floats(rows[c, W]), size), carray(floats(rows[c, P]), size)
        own = segments[rows[c, SEGMENT] : rows[c, SEGMENTS]]
        matrices = members[rows[c, MEMBER] : rows[c, MEMBERS]]
        table[0, 0], table[0, 1], table[0, 3], table[0, 5] = rows[c, INDEX], rows[c, BASE], size, len(own)
        slices[1] = len(matrices)
        n = pack(
            total, p, w, table, own, slices[: 2 if sizes[c] > 0 else 1], matrices, sizes[c : c + 1], wanted[c : c + 1],
            guesses[c : c + 1], absent, DIFFERENCE, phase + c, DELTA, index_coding, value_coding, True,
            out[at:], pos, val, scratch, kept, counts, places, gain,
        )  # fmt: skip
        lengths[c] = -1
        if n >= 0 and apply(out[at : at + n], size, own, ADD_FINITE, p, pos, val, scratch) >= 0:
            lengths[c], at = n, at + n
