"""A shard's push log: every message that changed it, in the order in which they did.

A shard is a function of these messages alone: fed again they give the same parameters, the same optimizer state and
the same published versions, to the bit. So a message is written before it changes anything and before it is answered,
and one that was refused is not in here. What was handed over survives the death of the process, and `sync`, called
every second, lets it survive that of the machine.

A record is the length of the message u32, the message as it was on the wire, and its payload.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from .messages import AnyMessage, Message, Published
from .records import Buffer, Damaged, Records

LENGTH = struct.Struct("<I")


class Log(Protocol):
    """Where a shard writes what it is about to do."""

    def append(self, message: Message, payload: Buffer | None = None) -> None:
        """Raises OSError, and then nothing was written."""
        ...


class NoLog:
    """For a shard whose state may die with it."""

    def append(self, message: Message, payload: Buffer | None = None) -> None:
        pass


class PushLog:
    """The log in one folder, which no other process has open."""

    def __init__(self, folder: Path) -> None:
        """Raises Damaged or OSError."""
        self.records = Records(folder)
        self._decoder = msgspec.msgpack.Decoder(AnyMessage | Published)

    def append(self, message: Message, payload: Buffer | None = None) -> None:
        head = msgspec.msgpack.encode(message)
        self.records.append(LENGTH.pack(len(head)), head, payload if payload is not None else b"")

    def replay(self, start: int = 0) -> Iterator[tuple[Message, memoryview]]:
        """Every message from record `start` on with its payload. Raises Damaged."""
        for number, body in self.records.replay(start):
            try:
                end = LENGTH.size + LENGTH.unpack_from(body)[0]
                message = self._decoder.decode(body[LENGTH.size : end])
            except (struct.error, msgspec.MsgspecError) as bad:
                raise Damaged(self.records.folder, number, f"record {number} is no message: {bad}") from None
            yield message, body[end:]

    def close(self) -> None:
        self.records.close()
