"""The log of all processes of a run as one, from its end backwards or from a place on, filtered while it is read.

Nothing is read whole: pieces of each file, back from where the reader stands, until there are enough lines. A `Cursor`
is that place in every file, and opaque to whoever holds it. A line longer than `LONGEST` is passed over; what is no JSON
is shown as it is. Lines of one file stay in their order; between files their time decides.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .views import LogLine, Logs

LEVELS = ("debug", "info", "warning", "error", "critical")
LONGEST = 256 * 1024
PIECE = 128 * 1024
MOST_BYTES = 24 * 2**20  # that one look may read
MOST_LINES = 2000
MOST_FILES = 2048
MESSAGE_CHARS = 8000
KNOWN = frozenset({"time", "level", "message", "id", "role", "job", "run", "host", "pid"})

Cursor = dict[str, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines. Empty: all."""

    members: frozenset[str] = frozenset()
    level: str = ""  # this one and worse
    text: str = ""  # in any case, anywhere in the line

    def takes(self, line: LogLine, raw: bytes) -> bool:
        if self.members and line.member not in self.members:
            return False
        if self.level in LEVELS and rank(line.level) < LEVELS.index(self.level):
            return False
        return not self.text or self.text.casefold() in raw.decode("utf-8", "replace").casefold()


def rank(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else 1


@dataclass(slots=True)
class Back:
    """One file, read backwards: whole lines, the newest first."""

    file: int
    place: int  # everything before is still to read
    rest: bytes = b""  # the end of a line whose beginning is before `place`
    lines: list[tuple[int, bytes]] = field(default_factory=list)  # (where it begins, its bytes), the newest last
    read: int = 0
    whole: bool = True  # `rest` is a line from its end on; False: it is too long, and is passed over

    def next(self) -> tuple[int, bytes] | None:
        while not self.lines and self.place > 0:
            size = min(PIECE, self.place)
            self.place -= size
            self.read += size
            data = os.pread(self.file, size, self.place)
            first, *more = data.split(b"\n")
            if not more:
                self.rest = first + self.rest
                if len(self.rest) > LONGEST:
                    self.rest, self.whole = b"", False
                continue
            tail = more.pop() + self.rest
            at = self.place + len(first) + 1
            for line in more:
                self.lines.append((at, line))
                at += len(line) + 1
            if self.whole:
                self.lines.append((at, tail))
            self.rest, self.whole = first, True
        if not self.lines and self.place == 0 and (self.rest or not self.whole):
            if self.whole:
                self.lines.append((0, self.rest))
            self.rest, self.whole = b"", True
        return self.lines.pop() if self.lines else None


class LogFolder:
    """The `logs` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> dict[str, Path]:
        """What is read, by name."""
        try:
            found = sorted(each.name for each in os.scandir(self.folder) if each.name.endswith(".jsonl"))
        except OSError:
            return {}
        return {name.removesuffix(".jsonl"): self.folder / name for name in found[:MOST_FILES]}

    def members(self) -> list[str]:
        return sorted({member_of(name) for name in self.files()}, key=lambda name: (len(name), name))

    def version(self) -> str:
        """Another one when there is more."""
        total = 0
        for path in self.files().values():
            try:
                total += os.stat(path).st_size
            except OSError:
                continue
        return str(total)

    def newest(self, count: int, wanted: Wanted, before: Cursor | None = None) -> Logs:
        """The newest lines, or those before a place."""
        count = max(1, min(count, MOST_LINES))
        open_: dict[str, Back] = {}
        ends: Cursor = {}
        try:
            for name, path in self.files().items():
                if wanted.members and member_of(name) not in wanted.members:
                    continue
                try:
                    file = open_regular(path)
                except OSError:
                    continue
                end = whole_end(file)
                ends[name] = end
                open_[name] = Back(file, min(end, (before or {}).get(name, end if before is None else 0)))
            heads: dict[str, tuple[LogLine, int]] = {}
            starts = {name: each.place for name, each in open_.items()}
            spent = 0

            def advance(name: str) -> None:
                """To the next line of this file that is wanted."""
                nonlocal spent
                back = open_[name]
                heads.pop(name, None)
                while spent < MOST_BYTES and (found := back.next()) is not None:
                    spent += back.read
                    back.read = 0
                    line = read_line(found[1], name)
                    if line is not None and wanted.takes(line, found[1]):
                        heads[name] = (line, found[0])
                        return
                    starts[name] = found[0]

            for name in open_:
                advance(name)
            lines: list[LogLine] = []
            while heads and len(lines) < count:
                newest = max(heads, key=lambda name: heads[name][0].at)
                lines.append(heads[newest][0])
                starts[newest] = heads[newest][1]
                advance(newest)
            more = bool(heads) or spent >= MOST_BYTES
            return Logs(
                lines=lines[::-1],
                before=pack(starts) if more else "",
                after=pack(ends),
                members=self.members(),
                more=more,
            )
        finally:
            for each in open_.values():
                os.close(each.file)

    def since(self, place: Cursor, count: int, wanted: Wanted) -> Logs:
        """What was written after a place, the oldest first; where it is more than `count`, go on from the answer's."""
        count = max(1, min(count, MOST_LINES))
        lines: list[LogLine] = []
        ends: Cursor = {}
        more = False
        for name, path in self.files().items():
            if wanted.members and member_of(name) not in wanted.members:
                continue
            try:
                file = open_regular(path)
            except OSError:
                continue
            try:
                begin = place.get(name, 0)
                size = os.fstat(file).st_size
                if begin > size:
                    begin = 0  # rotated: this is another file
                ends[name] = begin
                for end, raw in forward(file, begin, min(size, begin + MOST_BYTES // 8)):
                    ends[name] = end
                    line = read_line(raw, name)
                    if line is not None and wanted.takes(line, raw):
                        lines.append(line)
                    if len(lines) >= 4 * count:
                        more = True
                        break
            finally:
                os.close(file)
        lines.sort(key=lambda line: line.at)
        return Logs(lines=lines[-4 * count :], before="", after=pack(ends), members=self.members(), more=more)


def forward(file: int, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines and where they end."""
    place, rest = begin, b""
    while place < end:
        data = os.pread(file, min(PIECE, end - place), place)
        if not data:
            return
        at = place - len(rest)
        place += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            at += len(line) + 1
            yield at, line
        if len(rest) > LONGEST:
            rest = rest[-1:]


def whole_end(file: int) -> int:
    """Where the last whole line ends."""
    size = os.fstat(file).st_size
    place = size
    while place > max(0, size - LONGEST):
        begin = max(0, place - 4096)
        found = os.pread(file, place - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        place = begin
    return 0


def open_regular(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(path)
    return file


def member_of(name: str) -> str:
    """ "w0.script" is w0's."""
    return name.partition(".")[0]


def read_line(raw: bytes, name: str) -> LogLine | None:
    """None for an empty one."""
    if not raw.strip(b"\0 \r\t") or len(raw) > LONGEST:
        return None
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = raw.decode("utf-8", "replace")
        return LogLine(at="", level="info", member=member_of(name), message=text[:MESSAGE_CHARS])
    return LogLine(
        at=text_of(fields.get("time"), 40),
        level=text_of(fields.get("level"), 20) or "info",
        member=member_of(name),
        message=text_of(fields.get("message"), MESSAGE_CHARS),
        fields={
            key[:80]: text_of(value, 2000) if not isinstance(value, int | float | bool) else value
            for key, value in list(fields.items())[:40]
            if key not in KNOWN and value not in (None, "")
        },
    )


def text_of(value: Any, most: int) -> str:
    text = value if isinstance(value, str) else "" if value is None else msgspec.json.encode(value).decode()
    return text if len(text) <= most else text[: most - 1] + "…"


def pack(cursor: Cursor) -> str:
    return msgspec.json.encode(cursor).decode()


def unpack(text: str) -> Cursor | None:
    """None for what is no cursor of ours."""
    try:
        found = msgspec.json.decode(text, type=dict[str, int])
    except msgspec.MsgspecError:
        return None
    return found if all(0 <= place < 2**53 for place in found.values()) else None
