"""Codecs that send every element: `none`, 32 bits as they are, and `bf16`, 16 bits with error feedback.

What bfloat16 drops of a gradient stays in the residual and leaves with a later one; what it drops of a delta
stays in w - p, which is error feedback on the way down (EF21-P, Gruntkowska et al., ICML 2023). Rounding is
to nearest, ties to even, as torch converts.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..layout import CHUNK, Chunk, Segment
from .behind import Behind
from .frame import HEADER, BadFrame, Buffer, Header, Kind, expect, write_header

# torch warns once in a process that a tensor over read-only memory could be written to. Received frames are
# such memory and nothing here writes to them: let the one warning come now, unseen.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(4), dtype=torch.float32)


class NonFinite(ValueError):
    """The gradient of this parameter (index in the layout) has a NaN or an infinity. Nothing was changed, up to the
    rounding of sums with what was packed before it was met."""

    def __init__(self, parameter: int) -> None:
        super().__init__(f"the gradient of parameter {parameter} is not finite")
        self.parameter = parameter


def finite(values: Tensor) -> bool:
    # A sum costs 1/30 of isfinite().all(), and is not finite if any element is not. It may also overflow.
    return math.isfinite(values.sum(dtype=torch.float32).item()) or bool(torch.isfinite(values).all())


def _refuse_non_finite(chunk: Chunk, values: Tensor) -> None:
    if finite(values):
        return
    for segment in chunk.segments:
        if not torch.isfinite(part(values, segment)).all():
            raise NonFinite(segment.parameter)


def part(values: Tensor, segment: Segment) -> Tensor:
    """The elements of one segment of a chunk."""
    return values[segment.offset : segment.offset + segment.size]


def _body(frame: Buffer, dtype: torch.dtype, size: int) -> Tensor:
    """The body as a tensor over the frame's own memory, or over a copy where it is not aligned."""
    values = torch.frombuffer(frame, dtype=dtype, offset=HEADER.size, count=size)
    return values if values.data_ptr() % dtype.itemsize == 0 else values.clone()


def read_parameters(chunk: Chunk, frame: Buffer, version: int) -> Tensor:
    """The parameters in a frame that every codec may send; over the frame's own memory. Raises BadFrame."""
    header = expect(frame, Exact.id, Kind.PARAMETERS, chunk.index, version)
    if header.body != 4 * chunk.size:
        raise BadFrame(f"parameters of {header.body} bytes for {chunk.size} elements")
    return _body(frame, torch.float32, chunk.size)


def write_parameters(chunk: Chunk, values: Tensor, version: int) -> bytes:
    """The frame with these parameters, a copy."""
    return join(Header(Exact.id, Kind.PARAMETERS, chunk.index, version, 4 * chunk.size), values)


def join(header: Header, body: Tensor) -> bytes:
    """A frame, in one copy of the body."""
    head = bytearray(HEADER.size)
    write_header(memoryview(head), header)
    return b"".join((head, body.view(torch.uint8).numpy().data))


class Dense(Protocol):
    """What a packer asks of a codec that sends every element."""

    lossless: bool

    def bound(self, chunk: Chunk) -> int:
        """No gradient frame of this chunk has more bytes."""
        ...

    def place(self, chunk: Chunk, out: memoryview) -> Tensor | None:
        """The tensor inside `out` where a frame keeps its values, if it keeps them as they are: gathering a
        gradient there saves one copy."""
        ...

    def encode(
        self,
        chunk: Chunk,
        values: Tensor,
        residual: Tensor | None,
        out: memoryview,
        absent: Collection[int] = (),
    ) -> int:
        """Write the frame of `values + residual` into `out`, and leave in the residual what it does not hold.

        Returns its bytes. Raises NonFinite, and then the residual is untouched.
        """
        ...

    def decode(self, chunk: Chunk, frame: Buffer, out: Tensor, add: bool) -> None: ...


class DensePacker:
    """Values, residuals and frames of one bucket, in warm memory that every step uses again."""

    def __init__(self, codec: Dense, chunks: Sequence[Chunk]) -> None:
        self.codec = codec
        self.chunks = tuple(chunks)
        self.values: dict[int, Tensor] = {}
        self._buffer = memoryview(bytearray(sum(codec.bound(chunk) for chunk in chunks)))
        self._frames: list[memoryview] = []  # of the last pack, chunk by chunk
        self._residual: list[Tensor | None] = []
        at = 0
        for chunk in self.chunks:
            inside = codec.place(chunk, self._buffer[at:])
            self.values[chunk.index] = torch.zeros(chunk.size) if inside is None else inside
            self._residual.append(None if codec.lossless else torch.zeros(chunk.size))
            at += codec.bound(chunk)

    def pack(
        self, absent: Collection[int] = (), density: float | None = None, decay: float = 1.0
    ) -> memoryview:
        self._frames, at = [], 0
        for chunk, residual in zip(self.chunks, self._residual, strict=True):
            out = self._buffer[at:]
            try:
                size = self.codec.encode(chunk, self.values[chunk.index], residual, out, absent)
            except NonFinite:
                self.take_back()
                raise
            self._frames.append(out[:size])
            at += size
        return self._buffer[:at]

    def take_back(self) -> None:
        for chunk, residual, frame in zip(self.chunks, self._residual, self._frames, strict=False):
            if residual is not None:
                self.codec.decode(chunk, frame, residual, add=True)  # e = e' + C(g + e) - g
                residual.sub_(self.values[chunk.index])
        self._frames = []

    def residual(self, chunk: int) -> Tensor | None:
        places = [held.index for held in self.chunks]
        return self._residual[places.index(chunk)]

    def sent(self, chunk: int) -> Tensor | None:
        return None

    def differing(self) -> None:
        return None


class Exact:
    """`none`: the elements themselves. What is received is what was sent, to the last bit."""

    name = "none"
    id = 0
    lossless = True

    def packer(self, chunks: Sequence[Chunk]) -> DensePacker:
        return DensePacker(self, chunks)

    def device_packer(self, chunks: Sequence[Chunk], device: str) -> DensePacker:
        return DensePacker(self, chunks)

    def entries(self, chunk: Chunk, frame: Buffer) -> int:
        return chunk.size

    def bound(self, chunk: Chunk) -> int:
        return HEADER.size + 4 * chunk.size

    def place(self, chunk: Chunk, out: memoryview) -> Tensor | None:
        values = torch.frombuffer(out, dtype=torch.float32, offset=HEADER.size, count=chunk.size)
        return values if values.data_ptr() % 4 == 0 else None

    def encode(
        self,
        chunk: Chunk,
        values: Tensor,
        residual: Tensor | None,
        out: memoryview,
        absent: Collection[int] = (),
    ) -> int:
        _refuse_non_finite(chunk, values)
        body = torch.frombuffer(out, dtype=torch.float32, offset=HEADER.size, count=chunk.size)
        if body.data_ptr() != values.data_ptr():
            body.copy_(values)
        write_header(out, Header(self.id, Kind.GRADIENT, chunk.index, 0, 4 * chunk.size))
        return HEADER.size + 4 * chunk.size

    def check(self, chunk: Chunk, frame: Buffer) -> None:
        header = expect(frame, self.id, Kind.GRADIENT, chunk.index, 0)
        if header.body != 4 * chunk.size:
            raise BadFrame(f"a gradient of {header.body} bytes for {chunk.size} elements")

    def view(self, chunk: Chunk, frame: Buffer) -> Tensor | None:
        self.check(chunk, frame)
        return _body(frame, torch.float32, chunk.size)

    def decode(self, chunk: Chunk, frame: Buffer, out: Tensor, add: bool) -> None:
        self.check(chunk, frame)
        values = _body(frame, torch.float32, chunk.size)
        _ = out.add_(values) if add else out.copy_(values)

    def total(self, chunk: Chunk, frames: Sequence[Buffer], out: Tensor) -> None:
        for frame in frames:
            self.check(chunk, frame)
        first, *others = (_body(frame, torch.float32, chunk.size) for frame in frames)
        if not others:
            out.copy_(first)
            return
        torch.add(first, others[0], out=out)
        for values in others[1:]:
            out.add_(values)

    def publish(self, behind: Sequence[Behind]) -> list[bytes]:
        for each in behind:
            if each.p.data_ptr() != each.w.data_ptr():
                each.p.copy_(each.w)
        return [write_parameters(each.chunk, each.w, each.version) for each in behind]

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        raise BadFrame("the codec `none` has no deltas")


class Bf16:
    """`bf16`: half the bytes. Gradients keep a residual on the worker, deltas keep theirs in w - p."""

    name = "bf16"
    id = 1
    lossless = False

    def __init__(self) -> None:
        self._wide = torch.empty(CHUNK)
        self._wide_too = torch.empty(CHUNK)
        self._narrow = torch.empty(CHUNK, dtype=torch.bfloat16)

    def packer(self, chunks: Sequence[Chunk]) -> DensePacker:
        return DensePacker(self, chunks)

    def device_packer(self, chunks: Sequence[Chunk], device: str) -> DensePacker:
        return DensePacker(self, chunks)

    def entries(self, chunk: Chunk, frame: Buffer) -> int:
        return chunk.size

    def bound(self, chunk: Chunk) -> int:
        return HEADER.size + 2 * chunk.size

    def place(self, chunk: Chunk, out: memoryview) -> Tensor | None:
        return None

    def encode(
        self,
        chunk: Chunk,
        values: Tensor,
        residual: Tensor | None,
        out: memoryview,
        absent: Collection[int] = (),
    ) -> int:
        total = self._wide[: chunk.size]
        if residual is None:
            total.copy_(values)
        else:
            torch.add(values, residual, out=total)
        waiting = [segment for segment in chunk.segments if segment.parameter in absent]
        for segment in waiting:
            part(total, segment).zero_()
        body = torch.frombuffer(out, dtype=torch.bfloat16, offset=HEADER.size, count=chunk.size)
        sent = self._wide_too[: chunk.size].copy_(body.copy_(total))
        _refuse_non_finite(chunk, sent)  # after rounding, which makes the largest floats infinite
        if residual is not None:
            kept = [(segment, part(residual, segment).clone()) for segment in waiting]
            torch.sub(total, sent, out=residual)  # e' = (g + e) - C(g + e)
            for segment, before in kept:
                part(residual, segment).copy_(before)
        write_header(out, Header(self.id, Kind.GRADIENT, chunk.index, 0, 2 * chunk.size))
        return HEADER.size + 2 * chunk.size

    def check(self, chunk: Chunk, frame: Buffer) -> None:
        self._expect(chunk, frame, Kind.GRADIENT, 0)

    def view(self, chunk: Chunk, frame: Buffer) -> Tensor | None:
        self.check(chunk, frame)
        return None

    def decode(self, chunk: Chunk, frame: Buffer, out: Tensor, add: bool) -> None:
        self.check(chunk, frame)
        values = _body(frame, torch.bfloat16, chunk.size)
        _ = out.add_(self._widened(values)) if add else out.copy_(values)

    def total(self, chunk: Chunk, frames: Sequence[Buffer], out: Tensor) -> None:
        for frame in frames:
            self.check(chunk, frame)
        for index, frame in enumerate(frames):
            self.decode(chunk, frame, out, add=index > 0)

    def publish(self, behind: Sequence[Behind]) -> list[bytes]:
        return [self._publish(*each) for each in behind]

    def _publish(self, chunk: Chunk, w: Tensor, p: Tensor, base: int, version: int, _: int) -> bytes:
        narrow = self._narrow[: chunk.size].copy_(torch.sub(w, p, out=self._wide[: chunk.size]))
        step = self._widened(narrow)  # d = C(w - p)
        if not finite(step):  # no delta leads there, or back
            p.copy_(w)
            return write_parameters(chunk, p, version)
        p.add_(step)
        return join(Header(self.id, Kind.DELTA, chunk.index, base, 2 * chunk.size), narrow)

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        self._expect(chunk, frame, Kind.DELTA, base)
        p.add_(self._widened(_body(frame, torch.bfloat16, chunk.size)))

    def _widened(self, narrow: Tensor) -> Tensor:
        return self._wide[: len(narrow)].copy_(narrow)

    def _expect(self, chunk: Chunk, frame: Buffer, kind: Kind, version: int) -> None:
        header = expect(frame, self.id, kind, chunk.index, version)
        if header.body != 2 * chunk.size:
            raise BadFrame(f"{header.body} bytes of bf16 for {chunk.size} elements")
