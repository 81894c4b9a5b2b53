"""`topk`: of a matrix the largest elements leave, the others wait in the residual until they are large.

Error feedback (Stich et al., "Sparsified SGD with Memory", NeurIPS 2018; Lin et al., "Deep Gradient Compression",
ICLR 2018) keeps what quantisation took as well. A threshold per tensor and bucket is found by sampling; vectors
(biases, norms) go whole, in 16 bits. On the way down the same codes carry what w has and p has not yet.

The rules: what a frame says is subtracted from the residual exactly as a reader will add it; a frame is checked
whole before any of it is used; a pack that is refused changes nothing, up to rounding (of a difference: neither of the
two states that it is of).
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..compression import INDICES, VALUES, Compression
from ..layout import CHUNK, Chunk
from .behind import Behind
from .dense import NonFinite, part
from .frame import HEADER, BadFrame, Buffer, Kind, expect
from .kernels import DELTAS, ON_DEVICES, prepare
from .kernels.reasons import SENTENCES
from .runs import Run, joined

if TYPE_CHECKING:
    from .deltas import Deltas
    from .device import DevicePacker

log = logging.getLogger(__name__)

AUTO = -1
LINE = 16  # elements of a cache line: every chunk begins on one
SAMPLE = 262_144 + LINE
LEAST_DECAY = 1e-6

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
NOWHERE: Ints = np.empty(0, np.int64)
DIFFERENCE = np.float32(-1)  # in place of a decay: values - residual


@dataclass(slots=True)
class IndexBytes:
    """What LZ4 did to index sections: bytes of all of them before and after, and of those it was tried on."""

    before: int = 0
    after: int = 0
    tried: int = 0
    tried_after: int = 0


class _Scratch:
    """Warm memory for kernels. One thread uses it at a time."""

    def __init__(self) -> None:
        self.pos = np.zeros(CHUNK, np.uint16)
        self.val = np.zeros(CHUNK, np.float32)
        self.bytes = np.zeros(2 * CHUNK + 1024, np.uint8)
        self.kept = np.zeros(SAMPLE, np.uint32)
        self.counts = np.zeros(2048, np.uint32)
        self.places = np.zeros(4096, np.int32)
        # What `kernels.pack` works in, in the order of its parameters.
        self.packing = (self.pos, self.val, self.bytes, self.kept, self.counts, self.places)
        self.total = np.zeros(CHUNK, np.float32)
        self.places_in_all = np.zeros(0, np.int64)  # as long as the largest bucket that was asked for
        self.host = np.zeros(0, np.float32)  # of the largest bucket whose gradients live on a device


def check_decay(decay: float) -> None:
    """A residual is divided by it where a pack is taken back. Raises ValueError."""
    if not LEAST_DECAY <= decay <= 1:
        raise ValueError(f"a decay of {decay}, which could not be taken back; it is above 0 and at most 1")


def frame_bound(size: int) -> int:
    """No frame of a chunk with so many elements has more bytes, whatever its codings are."""
    return HEADER.size + 4 + 2 * size + 64 + 4 * size + 4 * (1 + size // 256)


class Table:
    """What kernels need to know of one chunk that is alone in a buffer; all its matrices are one slice."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        rows = [(s.offset, s.size, 0 if s.ndim > 1 else -1, at) for at, s in enumerate(chunk.segments)]
        self.segments = np.array(rows, np.int64).reshape(-1, 4)  # start, size, slice (-1: vector), number
        self.members = np.flatnonzero(self.segments[:, 2] >= 0)
        self.elements = int(self.segments[self.members, 1].sum())  # outside of vectors
        self.sizes = np.array([self.elements], np.int64)
        self.count_at = HEADER.size + 2 * (chunk.size - self.elements) + 1  # where a frame says its entries


class TopKPacker:
    """One bucket. Values and residuals lie chunk by chunk in one slab each, so that one call packs all of them."""

    def __init__(self, codec: "TopK", chunks: Sequence[Chunk]) -> None:
        self.codec = codec
        self.chunks = tuple(chunks)
        self._starts: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        runs: list[Run] = []
        table: list[tuple[int, int, int, int, int, int]] = []
        slices: dict[int, list[int]] = {}  # parameter -> its segments, by row
        at = 0
        for chunk in self.chunks:
            table.append((chunk.index, 0, at, chunk.size, len(rows), len(rows) + len(chunk.segments)))
            self._starts.append(at)
            for segment in chunk.segments:
                if segment.ndim > 1:
                    slices.setdefault(segment.parameter, []).append(len(rows))
                rows.append((at + segment.offset, segment.size, -1, segment.parameter))
                runs.append(Run(segment.parameter, segment.start, at + segment.offset, segment.size))
            at += -(-chunk.size // LINE) * LINE
        self.runs = joined(runs)
        self._segments = np.array(rows, np.int64).reshape(-1, 4)
        for index, members in enumerate(slices.values()):
            self._segments[members, 2] = index
        self._table = np.array(table, np.int64).reshape(-1, 6)
        self._members = np.array([row for members in slices.values() for row in members], np.int64)
        self._slices = np.cumsum([0, *map(len, slices.values())], dtype=np.int64)
        self._sizes = np.array(
            [sum(rows[row][1] for row in members) for members in slices.values()], np.int64
        )
        self._absent = np.zeros(1 + max((row[3] for row in rows), default=0), np.bool_)
        self._values = torch.zeros(at)
        self._residual = torch.zeros(at)
        self._base = torch.empty(0)  # what differences are of, if any are asked for
        self.values = self.by_chunk(self._values)
        self._residuals = self.by_chunk(self._residual)
        # Pages are touched when they are first written, and no density writes all of them.
        self._out = np.empty(sum(frame_bound(chunk.size) for chunk in self.chunks), np.uint8)
        self._view = self._out.data
        self._size = 0  # bytes of the last pack; 0: there is nothing to take back
        self._decay = np.float32(1)  # of the last pack; DIFFERENCE: there is nothing to restore
        self._phase = 0
        self._floors = np.zeros(len(self._sizes), np.float32)  # thresholds
        self._gain = np.zeros(6, np.int64)
        self._squeeze = 0  # what the gain said before the last pack

    def by_chunk(self, slab: Tensor) -> Mapping[int, Tensor]:
        return {
            chunk.index: slab[start : start + chunk.size]
            for chunk, start in zip(self.chunks, self._starts, strict=True)
        }

    def differing(self) -> "TopKPacker":
        return self

    def slabs(self) -> tuple[Tensor, Tensor, Tensor]:
        if not len(self._base):
            self._base = torch.zeros_like(self._values)
        return self._base, self._values, self._residual

    def residual(self, chunk: int) -> Tensor:
        """What of a chunk has not left yet; live."""
        return self._residuals[chunk]

    def pack(
        self, absent: Collection[int] = (), density: float | None = None, decay: float = 1.0
    ) -> memoryview:
        check_decay(decay)
        self._decay = np.float32(decay)
        return self._pack(self._residual, self._values, absent, density)

    def pack_difference(self, density: float | None = None) -> memoryview:
        self._decay = DIFFERENCE
        return self._pack(self._values, self._base, (), density)

    def _pack(
        self, residual: Tensor, values: Tensor, absent: Collection[int], density: float | None
    ) -> memoryview:
        """decay * residual + values: the frames, and into the residual of this bucket what they leave."""
        density = self.codec.spec.density if density is None else min(max(density, 0.0), 1.0)
        wanted = np.minimum(np.maximum(np.rint(self._sizes * density), 1), self._sizes).astype(np.int64)
        self._absent[:] = False
        for parameter in absent:
            if parameter < len(self._absent):
                self._absent[parameter] = True
        self._squeeze = int(self._gain[4])
        self._gain[:4] = 0
        scratch = self.codec.scratch
        self._size = 0
        size = self.codec.kernels.pack(
            self._residual.numpy(),
            residual.numpy(),
            values.numpy(),
            self._table,
            self._segments,
            self._slices,
            self._members,
            self._sizes,
            wanted,
            self._floors,
            self._absent,
            self._decay,
            self._phase,
            int(Kind.GRADIENT),
            self.codec.index_coding,
            self.codec.value_coding,
            False,
            self._out,
            *scratch.packing,
            self._gain,
        )
        if size < 0:
            self._restore(self.chunks[: self._gain[5]])
            raise NonFinite(-1 - size)
        self._size = size
        self._phase += 1
        self.codec.note(self._gain)
        return self._view[:size]

    def take_back(self) -> None:
        if self._size:
            self._restore(self.chunks)
            self._size = 0
            self._phase -= 1

    def _restore(self, chunks: Sequence[Chunk]) -> None:
        """e = (e' + C(g + decay * e) - g) / decay, for the first chunks that were packed."""
        self._gain[4] = self._squeeze
        if self._decay == DIFFERENCE:
            return
        at = 0
        for chunk in chunks:
            end = at + HEADER.size + HEADER.unpack_from(self._view, at)[5]
            residual, values = self.residual(chunk.index), self.values[chunk.index]
            self.codec.add(chunk, self._out[at:end], residual)
            for segment in chunk.segments:
                if not self._absent[segment.parameter]:
                    part(residual, segment).sub_(part(values, segment)).div_(float(self._decay))
            at = end

    def sent(self, chunk: int) -> Tensor | None:
        return self.codec.positions(self.chunks, self._out[: self._size], chunk)

    def give(self, slab: Tensor) -> None:
        self._spread(slab, NOWHERE)

    def places(self) -> Ints:
        scratch = self.codec.spreading
        if len(scratch.places_in_all) < len(self._values):
            scratch.places_in_all = np.empty(len(self._values), np.int64)
        return scratch.places_in_all[: self._spread(self._values[:0], scratch.places_in_all)]

    def _spread(self, slab: Tensor, places: Ints) -> int:
        """The frames of the last pack into a slab, and where it chose elements into `places`; each may be empty."""
        scratch = self.codec.spreading
        found: int = self.codec.kernels.spread(
            self._out[: self._size],
            self._table,
            self._segments,
            slab.numpy(),
            places,
            scratch.pos,
            scratch.val,
            scratch.bytes,
        )
        assert found >= 0, SENTENCES[-found]  # nobody else has written these frames
        return found


class TopK:
    """`topk:DENSITY:VALUES`. `index_bytes` counts what LZ4 did in frames that were made here."""

    id = 2
    lossless = False

    def __init__(self, spec: Compression) -> None:
        self.spec = spec
        self.name = str(spec)
        self.value_coding = VALUES.index(spec.values)
        self.index_coding = INDICES.index(spec.indices) if spec.indices else AUTO
        self.kernels: Any = prepare(log.warning)
        self.scratch = _Scratch()
        self.index_bytes = IndexBytes()
        self.tables: dict[int, Table] = {}

    @cached_property
    def spreading(self) -> _Scratch:
        """Of the thread that looks at what was packed, while another packs; only workers have two."""
        return _Scratch()

    def write_as(self, values: str) -> None:
        """From now on; one of VALUES."""
        self.value_coding = VALUES.index(values)

    def follow(self, chunk: Chunk, frame: Buffer) -> None:
        """From now on write elements as they are in this checked frame."""
        if self.entries(chunk, frame):
            self.value_coding = (frame[self.table(chunk).count_at - 1] >> 3) & 7

    def packer(self, chunks: Sequence[Chunk]) -> TopKPacker:
        return TopKPacker(self, chunks)

    def device_packer(self, chunks: Sequence[Chunk], device: str) -> "DevicePacker":
        for module in ON_DEVICES:
            prepare(log.warning, module)
        from .device import DevicePacker

        return DevicePacker(self, chunks, device)

    def note(self, gain: Ints) -> None:
        before, after, tried, tried_after = (int(count) for count in gain[:4])
        self.index_bytes.before += before
        self.index_bytes.after += after
        self.index_bytes.tried += tried
        self.index_bytes.tried_after += tried_after

    def table(self, chunk: Chunk) -> Table:
        known = self.tables.get(chunk.index)
        if known is None or known.chunk is not chunk:
            known = self.tables[chunk.index] = Table(chunk)
        return known

    # -- gradients ---------------------------------------------------------------------------------------

    def check(self, chunk: Chunk, frame: Buffer) -> None:
        self._read(chunk, frame)

    def entries(self, chunk: Chunk, frame: Buffer) -> int:
        """Elements of vectors are not among them: they go whole, both ways, whatever a budget says."""
        at = self.table(chunk).count_at
        return int.from_bytes(frame[at : at + 3], "little")

    def view(self, chunk: Chunk, frame: Buffer) -> Tensor | None:
        self._read(chunk, frame)
        return None

    def decode(self, chunk: Chunk, frame: Buffer, out: Tensor, add: bool) -> None:
        expect(frame, self.id, Kind.GRADIENT, chunk.index, 0)
        if not add:
            self._read(chunk, frame)
            out.zero_()
        self.add(chunk, np.frombuffer(frame, np.uint8), out)

    def total(self, chunk: Chunk, frames: Sequence[Buffer], out: Tensor) -> None:
        for frame in frames:
            self._read(chunk, frame)
        out.zero_()
        for frame in frames:
            self.add(chunk, np.frombuffer(frame, np.uint8), out)

    # -- deltas --------------------------------------------------------------------------------------------

    @cached_property
    def deltas(self) -> "Deltas":
        """Of the shard; workers publish nothing."""
        prepare(log.warning, DELTAS)
        from .deltas import Deltas

        return Deltas(self)

    def publish(self, behind: Sequence[Behind]) -> list[bytes]:
        return self.deltas.publish(behind)

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        expect(frame, self.id, Kind.DELTA, chunk.index, base)
        _accept(chunk, self._apply(chunk, np.frombuffer(frame, np.uint8), self.kernels.ADD_FINITE, p.numpy()))

    # -- frames --------------------------------------------------------------------------------------------

    def read(self, chunk: Chunk, frame: NDArray[np.uint8]) -> int:
        """The entries of a frame into the scratch; how many, or the negative of a reason."""
        return self._apply(chunk, frame, self.kernels.READ, self.scratch.total)

    def positions(self, chunks: Sequence[Chunk], payload: NDArray[np.uint8], chunk: int) -> Tensor:
        """Of the entries that a bucket's payload has of one of its chunks; int64, on the CPU."""
        at = 0
        for held in chunks:
            if at >= len(payload):
                break
            end = at + HEADER.size + HEADER.unpack_from(payload.data, at)[5]
            if held.index == chunk:
                count = self.read(held, payload[at:end])
                return torch.from_numpy(self.scratch.pos[:count].astype(np.int64))
            at = end
        return torch.empty(0, dtype=torch.int64)

    def add(self, chunk: Chunk, frame: NDArray[np.uint8], out: Tensor) -> None:
        """Add a frame of whatever kind. Raises BadFrame."""
        _accept(chunk, self._apply(chunk, frame, self.kernels.ADD, out.numpy()))

    def _read(self, chunk: Chunk, frame: Buffer) -> None:
        expect(frame, self.id, Kind.GRADIENT, chunk.index, 0)
        _accept(chunk, self.read(chunk, np.frombuffer(frame, np.uint8)))

    def _apply(self, chunk: Chunk, frame: NDArray[np.uint8], what: int, out: Floats) -> int:
        scratch = self.scratch
        assert len(out) >= chunk.size
        found: int = self.kernels.apply(
            frame, chunk.size, self.table(chunk).segments, what, out, scratch.pos, scratch.val, scratch.bytes
        )
        return found


def _accept(chunk: Chunk, found: int) -> None:
    if found < 0:
        raise BadFrame(f"a frame of chunk {chunk.index}: {SENTENCES[-found]}")
