"""Append-only records in files: what the coordinator's journal and a shard's push log are made of.

A folder holds segments, each named by the number of its first record. A record is

    bytes of the body u32 | its number u64 | sum of the body u32 | CRC-32 of these 16 bytes u32 | body

Numbers have no gap, over all segments. What `append` has returned survives the death of the process; what `sync` has
returned survives that of the machine. A process that dies while it writes leaves a record that ends too early: such a
torn tail, of the last segment only, never was acknowledged, and is cut off when the folder is opened. Anything else
that does not fit is damage, and an error that names the place: nothing behind it can be believed. The header has a sum
of its own, so that a damaged length is not taken for a torn tail. That of the body is 32 bits of XXH3: a shard writes
every gradient here before it uses it, and CRC-32 takes ten times as long as a copy.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import xxhash

Buffer: TypeAlias = bytes | bytearray | memoryview
Found: TypeAlias = tuple[int, memoryview, int]
"""A record: its number, its body, and the byte of its segment at which it ends."""

HEAD = struct.Struct("<IQI")
SUM = struct.Struct("<I")
HEAD_BYTES = HEAD.size + SUM.size
MOST_BYTES = 64 << 20  # of one record
SEGMENT_BYTES = 64 << 20  # a new segment begins behind this
SUFFIX = ".records"
IOV_MOST = 512  # parts of one writev; the system's limit is 1,024


class Damaged(Exception):
    """A file does not hold what was written to it. Names the file, the place and what was found."""

    def __init__(self, path: Path, at: int, what: str) -> None:
        super().__init__(f"{path} is damaged at byte {at}: {what}")
        self.path = path
        self.at = at


class NoRoom(OSError):
    """The disk is full, or the quota used up. Nothing of the record is there, and the next may be tried."""


class Records:
    """One folder of records, open for appending by this process alone. `append` and `sync` may come from two threads.

    `first` is the number of the oldest record that is still there, `next` that of the record to come. `torn_bytes` says
    how much of a torn tail was cut off.
    """

    def __init__(self, folder: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Opens or creates. Raises Damaged, or OSError."""
        self.folder = folder
        self.segment_bytes = segment_bytes
        self.torn_bytes = 0
        self._lock = threading.Lock()  # over `_file` being exchanged
        self._segments = numbered(folder, SUFFIX)  # nobody else adds to them or takes any away
        self._newest: list[Found] | None = None  # the records of the last one, until they are replayed
        unused = []
        while len(self._segments) > 1 and not self._segments[-1][1].stat().st_size:
            unused.append(self._segments.pop())
        self.first = self._segments[0][0] if self._segments else 0
        self.next = self._end = 0
        if self._segments:
            self._file = self._reopen(*self._segments[-1])
            self._clear_away(unused)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._create()

    @property
    def bytes(self) -> int:
        """Of all segments."""
        return sum(path.stat().st_size for _, path in self._segments[:-1]) + self._end

    def replay(self, start: int = 0) -> Iterator[tuple[int, memoryview]]:
        """All records from `start` on with their numbers, each checked. Raises Damaged."""
        segments, newest, self._newest = self._segments.copy(), self._newest, None
        expected = segments[0][0]
        for place, (number, path) in enumerate(segments):
            if number != expected:
                raise Damaged(path, 0, f"its first record is {number}, and {expected} was to follow")
            last = place + 1 == len(segments)
            after = self.next if last else segments[place + 1][0]
            if after > start or last:
                held = last and newest
                for found, body, _ in held or _scan(_contents(path), path, number, last=last):
                    expected = found + 1
                    if found >= start:
                        yield found, body
            else:
                expected = after

    def append(self, *parts: Buffer) -> int:
        """Write one record, the parts one after another; returns its number. Raises NoRoom or OSError: then nothing of
        it is there."""
        size = sum(len(part) for part in parts)
        if size > MOST_BYTES:
            raise ValueError(f"a record of {size} bytes; {MOST_BYTES} are allowed")
        self._newest = None
        if self._file < 0 or self._end >= self.segment_bytes:
            self.begin_segment()
        head = HEAD.pack(size, self.next, _sum(*parts))
        try:
            _write_all(self._file, [head + SUM.pack(zlib.crc32(head)), *parts], self._end)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(error.errno, f"no room for {size} bytes", str(self.folder)) from error
            raise
        self._end += HEAD_BYTES + size
        self.next += 1
        return self.next - 1

    def begin_segment(self) -> int:
        """Let the next record begin a new segment; returns its number. What lies before can then be dropped."""
        if self._file < 0:
            raise OSError(errno.EBADF, "closed", str(self.folder))
        if self._end:
            os.fdatasync(self._file)
            self._newest = None
            file = self._create()
            with self._lock:
                former, self._file, self._end = self._file, file, 0
            os.close(former)
        return self.next

    def drop_before(self, number: int, into: Path | None = None) -> None:
        """Delete the segments that hold only records before `number`; or move them into a folder, for `read`."""
        if into is not None:
            into.mkdir(exist_ok=True)
        for (_, path), (after, _) in pairwise(self._segments.copy()):
            if after > number:
                break
            if into is None:
                path.unlink()
            else:
                path.rename(into / path.name)
            self.first = after
            del self._segments[0]
        sync_folder(self.folder)

    def sync(self) -> None:
        """What was appended before survives the machine."""
        with self._lock:
            file = os.dup(self._file)
        try:
            os.fdatasync(file)
        finally:
            os.close(file)

    def close(self) -> None:
        """Twice is the same as once. What is asked of it then is an OSError: its number may be another file's."""
        with self._lock:
            former, self._file = self._file, -1
        if former >= 0:
            os.close(former)

    def _reopen(self, number: int, path: Path) -> int:
        """The last segment, without its torn tail. What is read of it now is replayed, mostly at once."""
        file = os.open(path, os.O_RDWR)
        try:
            data = _all_of(file)
            self._newest = list(_scan(data, path, number, last=True))
            self.next, self._end = number, 0
            if self._newest:
                found, _, self._end = self._newest[-1]
                self.next = found + 1
            self.torn_bytes = len(data) - self._end
            if self.torn_bytes:
                os.ftruncate(file, self._end)
        except BaseException:
            os.close(file)
            raise
        return file

    def _clear_away(self, unused: list[tuple[int, Path]]) -> None:
        """Segments that were begun, and nothing was written to them."""
        for number, path in unused:
            if number > self.next:
                os.close(self._file)
                raise Damaged(path, 0, f"its first record is {number}, and {self.next} was to follow")
            path.unlink()

    def _create(self) -> int:
        """A new segment. Raises OSError: then none was begun, and the former one goes on."""
        path = self.folder / f"{self.next:020d}{SUFFIX}"
        folder = os.open(self.folder, os.O_RDONLY)  # before it: there may be no descriptor left for both
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.fsync(folder)
            except BaseException:
                os.close(file)
                path.unlink()
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(error.errno, "no room for a new segment", str(self.folder)) from error
            raise
        finally:
            os.close(folder)
        self._segments.append((self.next, path))
        return file


def read(*folders: Path) -> Iterator[tuple[int, memoryview]]:
    """All records of the segments in these folders, while another process may write to the last. Raises Damaged."""
    segments = sorted(segment for folder in folders for segment in numbered(folder, SUFFIX))
    expected = segments[0][0] if segments else 0
    for place, (number, path) in enumerate(segments):
        data = _contents(path)
        if number < expected and not data:
            continue  # it was begun and could not be kept, and the former one went on
        if number != expected:
            raise Damaged(path, 0, f"its first record is {number}, and {expected} was to follow")
        for found, body, _ in _scan(data, path, number, last=place + 1 == len(segments)):
            expected = found + 1
            yield found, body


def numbered(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """The files there whose name is a number and this suffix, by number; none where there is no folder."""
    try:
        names = os.listdir(folder)  # a tenth of the time of glob(): thousands are opened at once
    except FileNotFoundError:
        return []
    stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted((int(stem), folder / f"{stem}{suffix}") for stem in stems if stem.isdecimal())


def _contents(path: Path) -> memoryview:
    file = os.open(path, os.O_RDONLY)
    try:
        return _all_of(file)
    finally:
        os.close(file)


def _all_of(file: int) -> memoryview:
    """Fewer system calls than `read_bytes` needs: after each of them a thread waits for Python's lock."""
    parts, at = [], 0
    size = os.fstat(file).st_size
    while at < size and (part := os.pread(file, size - at, at)):
        parts.append(part)
        at += len(part)
    return memoryview(parts[0] if len(parts) == 1 else b"".join(parts))


def _scan(data: memoryview, path: Path, number: int, *, last: bool) -> Iterator[Found]:
    """Records of one segment. Stops before a torn tail of the last one."""
    at = 0
    while at < len(data):
        if len(data) - at < HEAD_BYTES:
            if last:
                return
            raise Damaged(path, at, f"{len(data) - at} bytes, less than a header")
        head = data[at : at + HEAD.size]
        size, found, expected = HEAD.unpack(head)
        if SUM.unpack_from(data, at + HEAD.size)[0] != zlib.crc32(head):
            if last and not any(data[at:]):
                return  # the machine died: the file had grown, and its bytes had not been written
            raise Damaged(path, at, "the sum of a header is wrong")
        if found != number:
            raise Damaged(path, at, f"record {found} where {number} was to follow")
        body = data[at + HEAD_BYTES : at + HEAD_BYTES + size]
        if len(body) < size:
            if last:
                return
            raise Damaged(path, at, f"record {number} has {len(body)} of {size} bytes")
        if _sum(body) != expected:
            raise Damaged(path, at, f"the sum of record {number} is wrong")
        at += HEAD_BYTES + size
        yield number, body, at
        number += 1


def _sum(*parts: Buffer) -> int:
    body = xxhash.xxh3_64()
    for part in parts:
        body.update(part)
    return body.intdigest() & 0xFFFF_FFFF


def _write_all(file: int, parts: list[Buffer], at: int) -> None:
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        written = os.pwritev(file, left[:IOV_MOST], at)
        at += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
