"""A shard's push log: every message that changed it, in the order in which they did.

A shard is a function of these messages alone: fed again they give the same parameters, the same optimizer state and
the same published versions, to the bit. So a message is written before it changes anything and before it is answered,
and one that was refused is not in here. What was handed over survives the death of the process, and `sync`, called
every second, lets it survive that of the machine.

A record is the length of the message u32, the message as it was on the wire, and its payload.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from ..errors import LOG_HELD
from ..hold import hold
from ..messages import AnyMessage, Message, Published
from ..records import Buffer, Damaged, Records
from . import base

LENGTH = struct.Struct("<I")
LOG = "log"
LEAST_BYTES = 64 << 20  # a log that is smaller is not cut
TIMES = 3  # nor one that is less than so many times what would have to be written instead


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
    """The log in one folder, which no other process has open, and the base from which it is read (`base`)."""

    def __init__(self, folder: Path) -> None:
        """Raises ZmlError where another process holds it, Damaged, or OSError."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold(
            folder, LOG_HELD, "one process at a time is a shard", "End it, or wait for its end."
        )
        try:
            self.records = Records(folder / LOG)
        except (Damaged, OSError):
            os.close(self._lock)
            raise
        self.bytes = self.records.bytes  # behind the newest base
        self._decoder = msgspec.msgpack.Decoder(AnyMessage | Published)

    def append(self, message: Message, payload: Buffer | None = None) -> None:
        head = msgspec.msgpack.encode(message)
        payload = payload if payload is not None else b""
        self.records.append(LENGTH.pack(len(head)), head, payload)
        self.bytes += len(head) + len(payload)

    @property
    def has_base(self) -> bool:
        return self.records.first > 0

    def is_long(self, state_bytes: int) -> bool:
        """Is it worth while to write a new base of this size?"""
        return self.bytes > max(LEAST_BYTES, TIMES * state_bytes)

    def cut(self) -> int:
        """From here on the log belongs to a new base, whose state is the shard's at this moment."""
        self.bytes = 0
        return self.records.begin_segment()

    def rebase(self, number: int, state: base.State) -> int:
        """Write the base for the cut at `number`, and drop the records before it; returns its bytes. Raises OSError,
        and then the former base and the whole log are still there. It may run in a thread of its own."""
        size = base.write(self.folder, number, state)
        self.records.drop_before(number)
        return size

    def base(self) -> tuple[int, base.State] | None:
        """The newest base, and the record that follows on it. Raises Damaged."""
        found = base.read(self.folder)
        if found is None and self.records.first > 0:
            raise Damaged(
                self.records.folder, 0, f"it begins with record {self.records.first}, and no base leads there"
            )
        return found

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
        """Twice is the same as once."""
        if self._lock >= 0:
            self.records.close()
            os.close(self._lock)
            self._lock = -1
