"""A file of lines that one process writes: appended whole, rotated by size, and never worth the process.

A line is one `write` to a file that is open for appending, so that a forked child may write beside its parent. When
the file would grow beyond its size, it becomes `NAME.1`, the former `NAME.1` becomes `NAME.2`, and so on; whoever
follows it knows it by its inode. What cannot be written, on a full disk above all, is counted; that is said once on
standard error, and in the file as soon as it takes lines again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

RETRY_S = 1.0  # between two tries to open what could not be opened

_open: weakref.WeakSet[LogFile] = weakref.WeakSet()


class LogFile:
    """`notice` makes a line of (lines lost, why) for when it goes on. The file comes into being with its first line."""

    def __init__(
        self,
        path: Path,
        *,
        rotate_bytes: int,
        kept: int,
        notice: Callable[[int, str], bytes] | None = None,
    ) -> None:
        self.path = path
        self.rotate_bytes = rotate_bytes
        self.kept = kept  # former files that stay, at least one
        self.notice = notice
        self.lost = 0  # lines since the last one that was written
        self.because = ""
        self._file = -1
        self._size = 0
        self._torn = False  # the last line has no end
        self._retry_at = 0.0
        self._complained = False
        self._lock = threading.RLock()
        _open.add(self)

    def write(self, data: bytes, lines: int = 1) -> None:
        """Append whole lines. Never raises OSError."""
        with self._lock:
            try:
                if self._file < 0:
                    self._begin()
                if self._size and self._size + len(data) > self.rotate_bytes:
                    self._rotate()
                self._append(self._missed() + data)
            except OSError as error:
                self.lost += lines
                self.because = error.strerror or str(error)
                self._complain()
            else:
                self.lost = 0

    def close(self) -> None:
        """Twice is the same as once; the next line would open it again."""
        with self._lock:
            former, self._file = self._file, -1
            if former >= 0:
                os.close(former)

    def _begin(self) -> None:
        if time.monotonic() < self._retry_at:
            raise OSError(None, self.because)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o644)
        except OSError:
            self._retry_at = time.monotonic() + RETRY_S
            raise
        self._size = os.fstat(self._file).st_size
        # A process that was killed, or the machine, may have left half a line.
        self._torn = self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"

    def _missed(self) -> bytes:
        end = b"\n" if self._torn else b""
        return end + (self.notice(self.lost, self.because) if self.lost and self.notice else b"")

    def _append(self, data: bytes) -> None:
        left = data
        try:
            while left:
                written = os.write(
                    self._file, left
                )  # less than all of it on a full disk; the next one says so
                self._size += written
                left = left[written:]
        finally:
            if len(left) < len(data):
                self._torn = bool(left) and not data[: len(data) - len(left)].endswith(b"\n")

    def _rotate(self) -> None:
        """What cannot be renamed grows on."""
        mine = os.fstat(self._file)
        self._size = mine.st_size
        if not self._is_there(mine):  # another process has rotated it, or somebody has deleted it
            self.close()
            self._begin()
        elif self._size >= self.rotate_bytes // 2:  # or lines as long as that would rotate at each
            for number in range(self.kept - 1, 0, -1):
                if (older := self._numbered(number)).exists():
                    os.replace(older, self._numbered(number + 1))
            os.replace(self.path, self._numbered(1))
            self.close()
            self._begin()

    def _is_there(self, mine: os.stat_result) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _complain(self) -> None:
        if self._complained:
            return
        self._complained = True
        try:
            print(f"zml: cannot write {self.path}: {self.because}; lines of it are lost", file=sys.stderr)
        except (OSError, ValueError, AttributeError):
            return  # nobody to tell


def _unlock() -> None:
    """In a forked child, where the thread that held a lock is gone."""
    for each in _open:
        each._lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock)
