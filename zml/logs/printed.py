"""What a process prints, as lines: the text for people to read, and the same as JSON lines for `zml logs` and shippers.

    w0.out          as it was printed, of a line that is rewritten with carriage returns (a progress bar) what it showed
                    in the end; standard output and error in the order in which they came
    w0.out.jsonl    one object per line: its time, its stream, a level, the step; without colours

The objects are the record, with all former files that `outlets` keeps. Of the text there are the newest 32 to 64 MB, so
that what most scripts print is there in both, and a script that prints much does not cost the disk twice.

A bar that is redrawn for an hour is no line until it ends: every 30 s what it shows is one, too. A very long line goes
in pieces. Levels: what a script prints has none, so that a line is "info" unless it looks like a warning or an error of
Python, its `logging` module, or of C++ (glog, as torch prints it); see `Levels`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..text.ansi import strip
from . import outlets as logs
from .logfile import LogFile

PIECE_BYTES = 32 * 1024  # of a line; what is longer goes in pieces
REDRAWN_EVERY_S = 30.0
TEXT_BYTES = 32 * 2**20
TEXT_KEPT = 1


class Piece(NamedTuple):
    """`ends`: the line ends here."""

    text: bytes
    ends: bool = True


class Splitter:
    """Bytes of one stream, as they come, to lines. Pure; holds one piece at most between two calls."""

    def __init__(self) -> None:
        self.rest = b""  # of a line that has no end yet
        self.redrawn_at: float | None = None  # when what it shows was last told, of a line that is redrawn

    def feed(self, data: bytes, now: float) -> list[Piece]:
        *whole, rest = (self.rest + data).split(b"\n")
        pieces = [piece for line in whole for piece in _pieces(_shown(line), ends=True)]
        if whole:
            self.redrawn_at = None
        shown = _shown(rest)
        if b"\r" in rest:
            if self.redrawn_at is None:
                self.redrawn_at = now
            elif now - self.redrawn_at >= REDRAWN_EVERY_S and shown:
                self.redrawn_at = now
                pieces.append(Piece(shown[:PIECE_BYTES]))
        *full, last = _pieces(shown, ends=False)
        self.rest = last.text + (b"\r" if rest.endswith(b"\r") else b"")
        return pieces + full

    def end(self) -> list[Piece]:
        """The stream is over: what has no end is a line, too."""
        rest, self.rest = _shown(self.rest), b""
        return [Piece(rest)] if rest else []


def _shown(line: bytes) -> bytes:
    """What a terminal shows of a line that is rewritten: what came after the last carriage return."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _pieces(line: bytes, *, ends: bool) -> list[Piece]:
    """At least one, the last of at most PIECE_BYTES; cut between characters of UTF-8."""
    pieces = []
    while len(line) > PIECE_BYTES:
        cut = PIECE_BYTES
        while cut > PIECE_BYTES - 3 and line[cut] & 0xC0 == 0x80:
            cut -= 1
        pieces.append(Piece(line[:cut], ends=False))
        line = line[cut:]
    return [*pieces, Piece(line, ends)]


# -- how bad ----------------------------------------------------------------------------------------------

# What may stand before a level: times, a name and a dash, dashes, bars: "2026-03-01 12:00:00,123 - a.b - ERROR".
BEFORE = r"(?:\[?\d[\d:.,TZ+-]*\]?\s+|[\w.]+\s+-\s+|[|-]\s+){0,6}\[?"
WARNS = re.compile(
    r"(?:[^\s:]+:\d+: )?\w*[Ww]arning: "  # warnings.warn: train.py:3: UserWarning: careful
    rf"|{BEFORE}WARN(?:ING)?(?=[\]:\s])"
    r"|(?:\[rank\d+\]:)?\[?W\d{4} "  # glog: [W1127 02:17:14.329 ...]
)
FAILS = re.compile(
    rf"{BEFORE}(?:ERROR|CRITICAL|FATAL)(?=[\]:\s])"
    r"|(?:\[rank\d+\]:)?\[?[EF]\d{4} "
    r"|(?:error|Fatal Python error|Segmentation fault): "
)
TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
AT_END = re.compile(r"[A-Za-z_][\w.]*(?::|$)")  # ValueError: no


class Levels:
    """How bad the lines of one stream are. A traceback is an error from its head to the line that names the exception,
    which is the first that is not indented."""

    def __init__(self) -> None:
        self.in_traceback = False

    def of(self, line: str) -> str:
        if self.in_traceback:
            if not line.startswith((" ", "\t")):
                self.in_traceback = False
                return "error" if AT_END.match(line) else self.of(line)
            return "error"
        if TRACEBACK.match(line):
            self.in_traceback = True
            return "error"
        if FAILS.match(line):
            return "error"
        return "warning" if WARNS.match(line) else "info"


# -- to the disk ------------------------------------------------------------------------------------------


class Printed:
    """The two files of one process. `constant` is what `outlets.about` says of it; no file comes into being before the
    first line, and none that cannot be written is an error."""

    def __init__(self, path: Path, constant: Mapping[str, Any]) -> None:
        self.constant = dict(constant)
        self.text = LogFile(path, rotate_bytes=TEXT_BYTES, kept=TEXT_KEPT)
        self.objects = logs.log_file(path.with_name(f"{path.name}.jsonl"), constant)
        self.levels: dict[str, Levels] = {}
        self.unfinished = ""  # the stream whose last line in the text has no end yet

    @classmethod
    def of_member(cls, folder: Path, member: str, job: str, pid: int) -> Printed:
        """What a process of zml itself prints, which is little: a crash, an error before it had a log."""
        role = {"w": "worker", "p": "shard"}.get(member[0], member)
        return cls(folder / f"{member}.log", logs.about(role, member, job, logs.run_of(folder), pid))

    def write(self, stream: str, pieces: list[Piece], step: int = -1) -> list[str]:
        """Keep them; returns their text."""
        if not pieces:
            return []
        texts = [piece.text.decode(errors="replace") for piece in pieces]
        level_of = self.levels.setdefault(stream, Levels()).of
        when = logs.stamp(time.time())
        at = {"step": step} if step >= 0 else {}
        plain, objects = [], []
        if self.unfinished not in ("", stream):
            plain.append("\n")
        self.unfinished = "" if pieces[-1].ends else stream
        for text, piece in zip(texts, pieces, strict=True):
            plain.append(text + "\n" * piece.ends)
            shown = strip(text).replace("\r", " ")
            line = {"time": when, "level": level_of(shown), "message": shown, **self.constant, **at}
            line |= {"stream": stream} if piece.ends else {"stream": stream, "goes_on": True}
            objects.append(logs.encode(line) + b"\n")
        self.text.write("".join(plain).encode(), len(pieces))
        self.objects.write(b"".join(objects), len(pieces))
        return texts

    def line(self, stream: str, text: str) -> None:
        """Of a reader that has split the lines itself."""
        self.write(stream, _pieces(text.encode(errors="replace"), ends=True))

    def close(self) -> None:
        """Twice is the same as once."""
        self.text.close()
        self.objects.close()
