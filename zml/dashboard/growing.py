"""A file of JSON lines that grows: each look reads only what is new, and all of it again when the file is another one.

The history of a run is thinned now and then (see `runs.history.Rows`): then its file is replaced, and read anew. Torn
and foreign lines are passed over. Rows beyond `most` push out every other one; and of a file that has far more from the
start, only every so many lines are decoded: figures are cumulative, and what lies between two rows is exact anyway.
Only regular files are read, and of one that no recorder writes so long, the newest part.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ..files import open_regular

Kind = TypeVar("Kind")
PIECE = 4 * 2**20
MOST_BYTES = 256 * 2**20  # that are read of a file at one look
TAIL = 2**20  # bytes of the newest rows, where only these are wanted


class Growing(Generic[Kind]):
    """May be looked at from several threads."""

    def __init__(self, path: Path, kind: type[Kind], most: int) -> None:
        self.path = path
        self.decoder = msgspec.json.Decoder(kind)
        self.most = most
        self.rows: list[Kind] = []
        self.place = 0  # bytes that were read
        self.rest = b""  # of a line that is not whole yet
        self.identity: tuple[int, int] | None = None
        self.stride = 1  # of so many lines one is decoded
        self.seen = 0  # lines
        self.lock = threading.Lock()

    def look(self) -> list[Kind]:
        """All rows there are, the oldest first. The list is not to be changed, and does not change."""
        with self.lock:
            try:
                with os.fdopen(open_regular(self.path), "rb") as file:
                    self._read(file.fileno())
            except OSError:
                self._forget()
            return list(self.rows)

    def _forget(self) -> None:
        self.rows, self.place, self.rest, self.identity = [], 0, b"", None
        self.stride, self.seen = 1, 0

    def _read(self, file: int) -> None:
        found = os.fstat(file)
        if self.identity != (found.st_dev, found.st_ino) or found.st_size < self.place:
            self._forget()
            self.identity = (found.st_dev, found.st_ino)
        if found.st_size - self.place > MOST_BYTES:
            self.place, self.rest = found.st_size - MOST_BYTES, b""
        begin = self.place
        while self.place < found.st_size:
            piece = os.pread(file, min(PIECE, found.st_size - self.place), self.place)
            if not piece:
                break
            fresh = self.place == begin and not self.rows
            self.place += len(piece)
            *lines, self.rest = (self.rest + piece).split(b"\n")
            if fresh:  # as many lines for their bytes as here
                self.stride = max(1, int(len(lines) * (found.st_size - begin) / len(piece) / self.most))
            if len(self.rest) > PIECE:  # what is longer was not written by us
                self.rest = b""
            newest = len(lines) - 1 if self.place >= found.st_size else -1
            for number, line in enumerate(lines):
                self.seen += 1
                if (self.seen - 1) % self.stride and number != newest:
                    continue
                try:
                    self.rows.append(self.decoder.decode(line))
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    continue
            while len(self.rows) > self.most:
                self.rows = self.rows[:-1:2] + self.rows[-1:]
        self.stride = 1  # what comes from now on comes slowly


def ends(path: Path, kind: type[Kind]) -> list[Kind]:
    """The first row and the newest few, the oldest first: what tells how it goes now, whatever the file's size."""
    rows: list[Kind] = []
    decoder = msgspec.json.Decoder(kind)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            first = file.readline(PIECE)
            behind = file.tell()
            begin = max(behind, os.fstat(file.fileno()).st_size - TAIL)
            file.seek(begin)
            lines = file.read(TAIL).split(b"\n")
    except OSError:
        return rows
    for line in [first, *lines[1 if begin > behind else 0 :]]:
        try:
            rows.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return rows
