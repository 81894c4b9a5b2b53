"""The coordinator keeps what the processes of an attempt print and log on nodes that do not see its folder.

Rule: a file here is the beginning of what the process has written, byte for byte, and its size says how far that is:
what is there already counts once, what does not join on is not taken, and a coordinator that is started again needs to
remember nothing. A peer names a file and never a path; it grows up to a limit, and then says that it was cut off.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from ..lease import NO_ROOM
from ..logs.outlets import stamp
from ..transport import Refusal
from .wire import OUTPUT_BYTES, Output, Stored

FILE_BYTES = 256 << 20
ATTEMPT_BYTES = 1 << 30
MOST_WAITING = 64  # pieces, of all nodes together
MOST_COUNTED = 10_000  # attempts whose bytes are remembered
NAME = re.compile(r"[wp][0-9]{1,9}\.(?:out|log|out\.jsonl|log\.jsonl|jsonl|script\.jsonl)")
CUT = "zml: cut off here"
LAST_BYTES = 1024  # in which that is looked for
NEVER = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK}  # no file that it could be

log = structlog.get_logger()


def is_output(name: str, slot: str) -> bool:
    """May an output of this process be called this?"""
    return NAME.fullmatch(name) is not None and name.partition(".")[0] == slot


class Part(NamedTuple):
    """Of a piece: bytes that are there, bytes to be written now, and whether there is no room for the others."""

    skipped: int
    taken: int
    full: bool


def fitting(size: int, at: int, length: int, room: int) -> Part:
    """What to take of a piece that begins at byte `at`, for a file with so many bytes and room for so many more."""
    if at > size:
        return Part(0, 0, False)  # what is between them comes first
    skipped = min(size - at, length)
    taken = min(length - skipped, max(room, 0))
    return Part(skipped, taken, taken < length - skipped)


def cut_line(name: str, because: str, now: float) -> bytes:
    """What stands at the end of a file that is full."""
    if not name.endswith(".jsonl"):
        return f"{CUT}: {because}\n".encode()
    return (
        msgspec.json.encode({"time": stamp(now), "level": "warning", "message": f"{CUT}: {because}"}) + b"\n"
    )


class Outputs:
    """Writes in a thread of its own, one piece at a time: a disk that is slow holds up nobody but who prints."""

    def __init__(self, file_bytes: int = FILE_BYTES, attempt_bytes: int = ATTEMPT_BYTES) -> None:
        self.file_bytes = file_bytes
        self.attempt_bytes = attempt_bytes
        self.waiting = 0
        self.counted: dict[Path, int] = {}  # bytes in the `logs` of attempts
        self.trouble = ""  # and it was said
        self.threads = ThreadPoolExecutor(1, "zml-output")

    async def take(self, message: Output, payload: bytes, folder: Path) -> Stored:
        """Into the `logs` folder of the attempt, whose process runs where this comes from. Raises Refusal."""
        if not is_output(message.name, message.slot):
            raise Refusal("output", f"{message.name[:60]!r} is no output of {message.slot[:20]}")
        if len(payload) > OUTPUT_BYTES or message.at < -1:
            raise Refusal("output", f"no piece: {len(payload):,} bytes at {message.at:,}")
        if self.waiting >= MOST_WAITING:
            raise Refusal(NO_ROOM, f"{self.waiting} other pieces wait to be written")
        self.waiting += 1
        loop = asyncio.get_running_loop()
        try:
            stored = await loop.run_in_executor(self.threads, self._store, message, payload, folder)
        except OSError as error:
            if error.errno in NEVER:
                raise Refusal("output", f"{message.name} is no regular file") from None
            because = f"{folder / message.name} cannot be written: {error.strerror or error}"
            if (
                error.errno != errno.ENOENT and not self.trouble
            ):  # or the attempt's folder is still to be made
                self.trouble = because
                log.warning("output is not kept", because=because, then="it is asked for again")
            raise Refusal(NO_ROOM, because) from None
        finally:
            self.waiting -= 1
        if self.trouble and payload:
            self.trouble = ""
            log.info("output is kept again", attempt=message.job)
        return stored

    def _store(self, message: Output, payload: bytes, folder: Path) -> Stored:
        logs = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if message.at < 0 or not payload:
                return Stored(size_in(logs, message.name), False)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(message.name, flags, 0o644, dir_fd=logs)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError(errno.ENXIO, "no regular file")
                return self._append(file, message, payload, self._count(folder, logs), folder)
            finally:
                os.close(file)
        finally:
            os.close(logs)

    def _append(self, file: int, message: Output, payload: bytes, counted: int, folder: Path) -> Stored:
        size = os.fstat(file).st_size
        room = min(self.file_bytes - size, self.attempt_bytes - counted)
        if room < OUTPUT_BYTES and is_cut(file, size):
            return Stored(size, True)
        part = fitting(size, message.at, len(payload), room)
        data = memoryview(payload)[part.skipped : part.skipped + part.taken]
        try:
            write(file, data)
            if part.full:
                whose = "a file" if room == self.file_bytes - size else "all output of an attempt"
                most = self.file_bytes if room == self.file_bytes - size else self.attempt_bytes
                because = f"the coordinator keeps {most >> 20} MB of {whose}"
                torn = os.pread(file, 1, max(0, size + len(data) - 1)) not in (b"", b"\n")
                write(file, b"\n" * torn + cut_line(message.name, because, time.time()))
                log.warning("output is cut off", attempt=message.job, name=message.name, because=because)
        finally:
            after = os.fstat(file).st_size
            self.counted[folder] = counted + after - size
        return Stored(after, part.full)

    def _count(self, folder: Path, logs: int) -> int:
        if folder not in self.counted:
            while len(self.counted) >= MOST_COUNTED:
                del self.counted[next(iter(self.counted))]
            with os.scandir(logs) as entries:
                sizes = [e.stat(follow_symlinks=False).st_size for e in entries]
            self.counted[folder] = sum(sizes)
        return self.counted[folder]

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)


def size_in(folder: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def is_cut(file: int, size: int) -> bool:
    """Does its last line say so?"""
    last = os.pread(file, LAST_BYTES, max(0, size - LAST_BYTES))
    return CUT.encode() in last.rstrip(b"\n").rpartition(b"\n")[2]


def write(file: int, data: bytes | memoryview) -> None:
    """All of it, or an OSError; what was written until then is there, and counts."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]
