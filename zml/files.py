"""Reading a file that another process writes: its last lines, its growth, its replacement when it is rotated.

Memory is bounded by one piece, whatever the file's size. Only regular files are read, and no link is followed: a job
owns the folder its output lies in, and must not make the server read something else. Everything here blocks, and is
called in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

PIECE = 64 * 1024
FURTHEST_BACK = 64 * 2**20  # that the last lines are looked for
MOST_WHOLE = 16 * 2**20  # of a file that is read at once


class Reader:
    """An open file and a place in it. Raises OSError; FileNotFoundError also where it is no regular file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = open_regular(path)
        self.position = 0
        self.lock = threading.Lock()  # a thread may still read when whoever asked has gone

    def close(self) -> None:
        """May be called twice."""
        with self.lock:
            if self.file >= 0:
                os.close(self.file)
            self.file = -1

    @property
    def size(self) -> int:
        return os.fstat(self.file).st_size

    def seek(self, offset: int) -> int:
        """Go to a byte, or to the end where the file is shorter; returns where that is."""
        self.position = min(offset, self.size)
        return self.position

    def seek_last(self, lines: int) -> int:
        """Go to where the last so many lines begin; a last line that is not complete counts as one."""
        end = self.size
        self.position = end
        if lines == 0:
            return end
        wanted = lines
        place = end
        while place > max(0, end - FURTHEST_BACK):
            begin = max(0, place - PIECE)
            piece = os.pread(self.file, place - begin, begin)
            look = len(piece) - 1 if place == end and piece.endswith(b"\n") else len(piece)
            while (found := piece.rfind(b"\n", 0, look)) >= 0:
                wanted -= 1
                if wanted == 0:
                    self.position = begin + found + 1
                    return self.position
                look = found
            place = begin
        self.position = place
        return place

    def read(self, most: int = PIECE) -> bytes:
        """What follows, or nothing: then it is the end, for now."""
        with self.lock:
            piece = os.pread(self.file, most, self.position)
            self.position += len(piece)
            return piece

    def begin_again(self) -> bool:
        """Whether there is more to read after the end: the file is another by now, or was cut, and reading goes on
        at its front."""
        with self.lock:
            mine = os.fstat(self.file)
            try:
                now = os.stat(self.path, follow_symlinks=False)
                same = (now.st_ino, now.st_dev) == (mine.st_ino, mine.st_dev)
                if mine.st_size > self.position or (same and mine.st_size == self.position):
                    return not same  # what was written before the new name comes first
                if not same:
                    other = open_regular(self.path)
                    os.close(self.file)
                    self.file = other
            except FileNotFoundError:
                return False  # between two names, or gone: what was open stays open
            self.position = 0
            return True


def open_regular(path: str | Path) -> int:
    """Never waits, as opening a pipe would. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
    return file


def read_regular(path: str | Path, most: int = MOST_WHOLE) -> bytes:
    """All of a small file. Raises OSError; also where it is longer, or no regular file."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def size_of(path: str) -> int | None:
    """None where there is no regular file."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
