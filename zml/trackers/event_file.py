"""TensorBoard's event files, written by hand: neither TensorFlow, nor tensorboard, nor protobuf is needed.

A file is a row of records (TFRecord, tensorflow/core/lib/io/record_writer.h): length as uint64, its checksum, data, its
checksum, all little-endian; a checksum is CRC-32C (RFC 3720, appendix B.4), rotated right by 15 bits plus a constant.
The data is a protocol buffer (protobuf.dev/programming-guides/encoding) of the message Event
(tensorflow/core/util/event.proto), which holds a Summary (tensorflow/core/framework/summary.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

VERSION = "brain.Event:2"
DT_STRING = 7  # tensorflow/core/framework/types.proto
VARINT, DOUBLE, BYTES, FLOAT = 0, 1, 2, 5  # wire types
LARGEST = 3.4028234663852886e38  # of a float of 32 bits


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


# -- protocol buffers ----------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    number &= 0xFFFFFFFFFFFFFFFF  # int64 in two's complement
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def integer(field: int, value: int) -> bytes:
    return varint(field << 3 | VARINT) + varint(value)


def double(field: int, value: float) -> bytes:
    return varint(field << 3 | DOUBLE) + struct.pack("<d", value)


def single(field: int, value: float) -> bytes:
    """What is too large for 32 bits is infinite there."""
    if abs(value) > LARGEST and value == value:
        value = float("inf") if value > 0 else float("-inf")
    return varint(field << 3 | FLOAT) + struct.pack("<f", value)


def text(field: int, value: str | bytes) -> bytes:
    data = value.encode("utf-8", "replace") if isinstance(value, str) else value
    return varint(field << 3 | BYTES) + varint(len(data)) + data


# -- events --------------------------------------------------------------------------------------------------


def event(at: float, step: int, *what: bytes) -> bytes:
    """A record. Event: 1 wall_time, 2 step, 3 file_version, 5 summary."""
    return record(double(1, at) + integer(2, step) + b"".join(what))


def beginning(at: float) -> bytes:
    """Without this record at its head a file is none."""
    return event(at, 0, text(3, VERSION))


def scalars(at: float, step: int, values: Mapping[str, float]) -> bytes:
    """Summary: 1 value; Value: 1 tag, 2 simple_value."""
    drawn = (text(1, text(1, tag) + single(2, value)) for tag, value in values.items())
    return event(at, step, text(5, b"".join(drawn)))


def words(at: float, step: int, texts: Mapping[str, str]) -> bytes:
    """Markdown. Value: 1 tag, 8 tensor, 9 metadata; SummaryMetadata: 1 plugin_data; PluginData: 1 plugin_name."""
    metadata = text(9, text(1, text(1, "text")))
    drawn = (text(1, text(1, tag) + text(8, strings([said])) + metadata) for tag, said in texts.items())
    return event(at, step, text(5, b"".join(drawn)))


def strings(said: Iterable[str]) -> bytes:
    """TensorProto: 1 dtype, 2 tensor_shape, 8 string_val; TensorShapeProto: 2 dim; Dim: 1 size."""
    held = list(said)
    shape = text(2, text(2, integer(1, len(held))))
    return integer(1, DT_STRING) + shape + b"".join(text(8, each) for each in held)
