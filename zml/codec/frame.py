"""A frame: one chunk, coded. It says itself what it is, so that a log of frames can be read without its
context.

    codec u8 | kind u8 | 0 u16 | chunk u32 | version u32 | body bytes u32        little endian, 16 bytes
    body

`version` is 0 in a gradient; in a delta it is what a replica must hold before; in parameters it is their own.
The rule: a frame is checked whole before anything is written, and one that does not fit raises BadFrame.
Frames follow one another in a payload without padding: a body may start at any address.
"""

import struct
from collections.abc import Container, Sequence
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct("<BBHIII")
UNKNOWN = -1  # the version of somebody who holds nothing

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    GRADIENT = 0  # of one worker, at one clock
    DELTA = 1  # to be added to the parameters of `version`
    PARAMETERS = 2  # of `version`, exactly, fp32


class Header(NamedTuple):
    codec: int
    kind: int
    chunk: int
    version: int
    body: int  # bytes


class BadFrame(ValueError):
    """This frame is not what was asked for, or not a frame. Nothing was written."""


def parse(frame: Buffer) -> Header:
    """The header of a frame that is as long as it says. Raises BadFrame."""
    if len(frame) < HEADER.size:
        raise BadFrame(f"a frame of {len(frame)} bytes has no header")
    codec, kind, zero, chunk, version, body = HEADER.unpack_from(frame)
    if zero:
        raise BadFrame("reserved bytes of a frame are not zero")
    if HEADER.size + body != len(frame):
        raise BadFrame(f"a frame of {len(frame)} bytes says that its body has {body}")
    return Header(codec, kind, chunk, version, body)


def write_header(out: memoryview, header: Header) -> None:
    HEADER.pack_into(out, 0, header.codec, header.kind, 0, header.chunk, header.version, header.body)


def expect(frame: Buffer, codec: int, kind: Kind, chunk: int, version: int) -> Header:
    """The header, if the frame is of this codec, kind, chunk and version. Raises BadFrame."""
    header = parse(frame)
    if header[:4] != (codec, kind, chunk, version):
        raise BadFrame(
            "a frame of codec {}, kind {}, chunk {}, version {}".format(*header)
            + f", not of {codec}, {int(kind)}, {chunk}, {version}"
        )
    return header


def cut(payload: Buffer, most: int) -> list[memoryview]:
    """The frames that follow one another in a payload, `most` at most. Raises BadFrame."""
    rest = memoryview(payload)
    frames: list[memoryview] = []
    while len(rest):
        if len(frames) == most:
            raise BadFrame(f"more than {most} frames")
        if len(rest) < HEADER.size:
            raise BadFrame(f"{len(rest)} bytes after the last frame")
        size = HEADER.size + HEADER.unpack_from(rest)[5]
        if size > len(rest):
            raise BadFrame(f"a frame of {size} bytes in a payload that has {len(rest)} left")
        frames.append(rest[:size])
        rest = rest[size:]
    return frames


def split(payload: Buffer, chunks: Sequence[int]) -> dict[int, memoryview]:
    """The frames of a push by chunk: at most one for each of `chunks`, none for others. Raises BadFrame."""
    known: Container[int] = frozenset(chunks)
    frames: dict[int, memoryview] = {}
    for frame in cut(payload, len(chunks)):
        chunk = parse(frame).chunk
        if chunk not in known or chunk in frames:
            raise BadFrame(f"a frame for chunk {chunk}, which is not wanted here or was there before")
        frames[chunk] = frame
    return frames
