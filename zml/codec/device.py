"""`topk` for a bucket whose gradients live on a GPU: what stays behind never leaves the device.

The residual is added, the threshold found and the entries picked there, over the whole bucket at once and with one
wait; the host gets positions and values of the entries, and vectors, a tenth of a byte per element at 1 %. It writes
the frames of the CPU's packer, with the same kernel, and sends back what is left of those elements. So the two packers
differ in the sample that tells a threshold: the same thresholds give the same frames, unless more than twice as many
as wanted reach them; then the larger ones leave on both ways, but of equal ones not the same.

Torch operations on any device; on CUDA two Triton kernels pick the entries (`picking`). Where a frame may hold every
element of a chunk, its values are copied as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layout import Chunk
from .compiled import compiled, types
from .dense import NonFinite
from .frame import HEADER, Buffer, Kind
from .kernels.frames import put_frame, vector_elements
from .kernels.indices import DENSE
from .kernels.values import BITS
from .picking import Entries, Floats, Ints, picker
from .sparse import LINE, TopK, check_decay, frame_bound

HITS = 256  # kept elements that a sample should have
LEAST, MOST = 16_384, 262_144  # elements of a sample
TINY = 2.0**-126  # denormals wait in the residual until they are more
MIX = 0x9E3779B1  # moves the sample from pack to pack


class DevicePacker:
    """One bucket. `values` are tensors on `device`; frames, residual and rules are those of `TopKPacker`."""

    def __init__(self, codec: TopK, chunks: Sequence[Chunk], device: torch.device | str) -> None:
        self.codec = codec
        self.chunks = tuple(chunks)
        self.device = torch.device(device)
        segments: list[tuple[int, int, int, int]] = []
        table: list[tuple[int, int, int, int, int, int]] = []
        slices: dict[int, int] = {}  # by parameter
        at = 0
        for chunk in self.chunks:
            table.append((chunk.index, 0, at, chunk.size, len(segments), len(segments) + len(chunk.segments)))
            for segment in chunk.segments:
                part = slices.setdefault(segment.parameter, len(slices)) if segment.ndim > 1 else -1
                segments.append((at + segment.offset, segment.size, part, segment.parameter))
            at += -(-chunk.size // LINE) * LINE
        self._segments = np.array(segments, np.int64).reshape(-1, 4)
        self._table = np.array(table, np.int64).reshape(-1, 6)
        self._parameters = list(slices)
        self._runs = [[(s, n) for s, n, of, _ in segments if of == part] for part in slices.values()]
        self._sizes = np.array([sum(n for _, n in runs) for runs in self._runs], np.int64)
        self._absent = np.zeros(1 + max((row[3] for row in segments), default=0), np.bool_)
        self._elements = at
        self._values = torch.zeros(at, device=self.device)
        self._residual = torch.zeros(at, device=self.device)
        self.values: Mapping[int, Tensor] = {
            index: self._values[start : start + size] for index, _, start, size, *_ in table
        }
        self._lay_out()
        # Pages come when they are first written, and no density writes all of them.
        self._out = np.empty(sum(frame_bound(chunk.size) for chunk in self.chunks), np.uint8)
        self._view = self._out.data
        self._bytes = 0  # of the last pack; 0: there is nothing to take back
        self._before: list[tuple[Tensor | slice, Tensor]] = []  # what its elements were before they were sent
        self._decay = 1.0
        self._phase = 0
        self._gain = np.zeros(5, np.int64)
        self._squeeze = 0  # what the gain said before the last pack

    def _lay_out(self) -> None:
        """Tensors that never change: the slice of each element, and where vectors are."""
        slice_of = np.full(self._elements, len(self._sizes), np.int32)  # the last one is no slice
        for start, size, part, _ in self._segments.tolist():
            if part >= 0:
                slice_of[start : start + size] = part
        self._slice_of = torch.from_numpy(slice_of).to(self.device)
        vectors = [np.arange(s, s + n) for s, n, part, _ in self._segments.tolist() if part < 0]
        self._vectors_here: Ints = np.concatenate([np.zeros(0, np.int64), *vectors])
        self._vectors = torch.from_numpy(self._vectors_here).to(self.device)
        self._pick = picker(self._slice_of, self._vectors)
        self._never, self._all = (torch.tensor(each, device=self.device) for each in (torch.inf, TINY))

    def residual(self, chunk: int) -> Tensor:
        """What of a chunk has not left yet; live, on the device."""
        for index, _, start, size, *_ in self._table.tolist():
            if index == chunk:
                return self._residual[start : start + size]
        raise KeyError(chunk)

    # -- packing -----------------------------------------------------------------------------------------

    def pack(
        self, absent: Collection[int] = (), density: float | None = None, decay: float = 1.0
    ) -> memoryview:
        check_decay(decay)
        density = self.codec.spec.density if density is None else min(max(density, 0.0), 1.0)
        wanted = np.minimum(np.maximum(np.rint(self._sizes * density), 1), self._sizes).astype(np.int64)
        self._absent[:] = False
        self._absent[[parameter for parameter in absent if parameter < len(self._absent)]] = True
        self._bytes, self._before, self._decay = 0, [], decay
        total = (self._residual * decay).add_(self._values)  # two roundings, as on the CPU
        self._keep_silent(total)
        entries = self._pick(total, self._floors(total, wanted), 2 * wanted + 16)
        if not entries.finite:
            raise NonFinite(self._culprit(total))
        size = self._write(total, entries)
        self._keep_silent(total)  # what a frame says of them is zero
        self._residual.copy_(total)
        self._bytes = size
        self._phase += 1
        return self._view[:size]

    def take_back(self) -> None:
        if not self._bytes:
            return
        total = self._residual.clone()
        for index, values in self._before:
            total[index] = values
        total.sub_(self._values).div_(self._decay)
        self._keep_silent(total)
        self._residual.copy_(total)
        self._bytes, self._before = 0, []
        self._phase -= 1
        self._gain[4] = self._squeeze

    def sent(self, chunk: int) -> Tensor | None:
        return self.codec.positions(self.chunks, self._out[: self._bytes], chunk)

    def differing(self) -> None:
        return None

    def _keep_silent(self, total: Tensor) -> None:
        """Absent parameters are what they were."""
        if self._absent.any():
            for start, size, _, parameter in self._segments.tolist():
                if self._absent[parameter]:
                    total[start : start + size] = self._residual[start : start + size]

    def _floors(self, total: Tensor, wanted: Ints) -> Tensor:
        """The threshold of each slice, from a sample; infinity for those that are absent, and for no slice (last)."""
        floors: list[Tensor] = []
        for part, (size, many) in enumerate(zip(self._sizes.tolist(), wanted.tolist(), strict=True)):
            if self._absent[self._parameters[part]]:
                floors.append(self._never)
                continue
            if many >= size:
                floors.append(self._all)
                continue
            stride = (
                max(1, size // min(max(HITS * size // many, LEAST), MOST)) | 1
            )  # odd: not in step with rows
            skip = self._phase * MIX % stride
            parts = [total[start + min(skip, n - 1) : start + n : stride] for start, n in self._runs[part]]
            sample = (torch.cat(parts) if len(parts) > 1 else parts[0]).abs()
            rank = min(max(1, round(many * sample.numel() / size)), sample.numel())
            floors.append(torch.topk(sample, rank, sorted=False).values.amin())
        return torch.stack([*floors, self._never]).clamp_(min=TINY)

    def _culprit(self, total: Tensor) -> int:
        for start, size, _, parameter in self._segments.tolist():
            if not bool(torch.isfinite(total[start : start + size]).all()):
                return int(parameter)
        raise AssertionError("every element is finite")

    def _write(self, total: Tensor, entries: Entries) -> int:
        """The frames; what they say leaves `total`. Returns their bytes."""
        codec, scratch, host = self.codec, self.codec.scratch, self._host()
        host[self._vectors_here] = entries.vectors
        ends = np.append(np.searchsorted(entries.positions, self._table[:, 2]), len(entries.positions))
        whole = self._may_be_whole(np.diff(ends))
        for chunk in whole:
            start, size = self._table[chunk, 2:4].tolist()
            host[start : start + size] = total[start : start + size].cpu().numpy()
        self._squeeze = int(self._gain[4])
        self._gain[:4] = 0
        left, everything = entries.values, np.zeros(len(self.chunks), np.bool_)
        written = np.zeros(1, np.int64)
        _frames(
            host,
            self._table,
            self._segments,
            self._absent,
            entries.positions,
            ends.astype(np.int64),
            left,
            everything,
            self._phase,
            int(Kind.GRADIENT),
            codec.index_coding,
            codec.value_coding,
            self._out,
            scratch.pos,
            scratch.val,
            scratch.bytes,
            scratch.places,
            self._gain,
            written,
        )
        codec.note(self._gain)
        index = torch.cat([entries.index, self._vectors])
        after: list[tuple[Tensor | slice, Floats]] = [
            (index, np.concatenate([left, host[self._vectors_here]]))
        ]
        self._before = [(index, entries.before)]
        for chunk in np.flatnonzero(everything).tolist():
            start, size = self._table[chunk, 2:4].tolist()
            part = slice(start, start + size)
            after.append((part, host[part]))
            self._before.append((part, total[part].clone()))
        for where, values in after:
            total[where] = torch.from_numpy(values).to(self.device)
        return int(written[0])

    def _may_be_whole(self, counts: Ints) -> list[int]:
        """Places of the chunks of which a frame may hold every element."""
        found = []
        bits = BITS[self.codec.value_coding]
        for place, (count, row) in enumerate(zip(counts.tolist(), self._table.tolist(), strict=True)):
            size, first, last = row[3:]
            sparse = size - vector_elements.py_func(self._segments, first, last)
            if count and (
                self.codec.index_coding == DENSE or 3 * count > sparse or count * bits + size > sparse * bits
            ):
                found.append(place)
        return found

    def _host(self) -> Floats:
        """The bucket's elements on the host: only those that frames need are filled in."""
        scratch = self.codec.scratch
        if len(scratch.host) < self._elements:
            scratch.host = np.zeros(self._elements, np.float32)
        return scratch.host


def add_frames(
    codec: TopK, chunks: Sequence[Chunk], frames: Sequence[Buffer], starts: Sequence[int], out: Tensor
) -> None:
    """Add what gradient frames say to `out`, on any device, where the i-th chunk begins at starts[i].

    The host decodes; positions and values travel in one copy each. The sums have the bits that the CPU's have.
    Raises BadFrame, and then has changed nothing.
    """
    places: list[Ints] = []
    values: list[Floats] = []
    for chunk, frame, start in zip(chunks, frames, starts, strict=True):
        codec.check(chunk, frame)
        count = codec.read(chunk, np.frombuffer(frame, np.uint8))
        places.append(codec.scratch.pos[:count].astype(np.int64) + start)
        values.append(codec.scratch.val[:count].copy())
        vectors = [np.arange(s.offset, s.offset + s.size) for s in chunk.segments if s.ndim < 2]
        if vectors:
            places.append(np.concatenate(vectors) + start)
            short = np.frombuffer(frame, np.uint16, count=len(places[-1]), offset=HEADER.size)
            values.append((short.astype(np.uint32) << 16).view(np.float32))  # bfloat16
    index = torch.from_numpy(np.concatenate(places)).to(out.device)
    out.index_add_(0, index, torch.from_numpy(np.concatenate(values)).to(out.device))


_INTS, _TABLE, _F32, _BYTES = types.int64[::1], types.int64[:, ::1], types.float32[::1], types.uint8[::1]


@compiled(
    _F32, _TABLE, _TABLE, types.boolean[::1], _INTS, _INTS, _F32, types.boolean[::1],
    types.int64, types.int64, types.int64, types.int64,
    _BYTES, types.uint16[::1], _F32, _BYTES, types.int32[::1], _INTS, _INTS,
)  # fmt: skip
def _frames(
    total: Any,
    chunks: Any,
    segments: Any,
    absent: Any,
    positions: Any,
    ends: Any,
    left: Any,
    everything: Any,
    phase: Any,
    kind: Any,
    want_index: Any,
    coding: Any,
    out: Any,
    pos: Any,
    val: Any,
    scratch: Any,
    places: Any,
    gain: Any,
    written: Any,
) -> None:
    """Frames of all chunks, of the entries positions[ends[c]:ends[c + 1]], whose values are in `left` and become what
    is left of them.

    Where a frame has every element of a chunk instead, `everything` becomes true for it, and its values are taken from
    `total`, which what the frame says leaves. Vectors are always there. written[0] becomes the frames' bytes. The other
    arguments are those of the CPU's kernel.
    """
    at = np.int64(0)
    for c in range(len(chunks)):
        base, size, first, last = chunks[c, 2], chunks[c, 3], chunks[c, 4], chunks[c, 5]
        begin, n = ends[c], ends[c + 1] - ends[c]
        for i in range(n):
            pos[i] = positions[begin + i] - base
            val[i] = left[begin + i]
        probe = c == phase % len(chunks)
        tried, squeezed = gain[2], gain[3]
        at, many = put_frame(
            out, at, kind, chunks[c, 0], chunks[c, 1], total, base, size, segments, first, last, absent,
            pos, val, n, want_index, coding, probe or gain[4] > 0, scratch, places, gain,
        )  # fmt: skip
        if many == n:
            for i in range(n):
                left[begin + i] -= val[i]
        else:
            everything[c] = True
            for i in range(many):
                total[base + np.int64(pos[i])] -= val[i]
        if probe and gain[2] > tried:
            gain[4] = 1 if gain[3] - squeezed < gain[2] - tried else 0
    written[0] = at
