"""A run's log files as one stream: the newest lines of all its processes, merged by time, and what follows them.

    page = newest(run / "logs", Wanted(level="warning"), 200)     # the newest 200 that are wanted, the oldest first
    page = after(run / "logs", page.cursor, wanted)               # what came since; and so on, to follow
    page = after(run / "logs", start(run / "logs", since), wanted)  # from a time on, page by page

A `Line` is what one process said, a `Page` some of them and where to go on. A cursor is a text, opaque, of some
kilobytes with many processes: for each file by its inode, how far it was read. It survives rotation and restarts of
whoever holds it, and may come from a stranger. It tells nothing of what is wanted, so that the next page may be of
other lines. To page back, ask for `newest` with `until` set to the time of the first line that is here.

Memory is bounded whatever the files are: a block and a line per file, and the page. The files are read from their ends
as far as it needs; `budget_bytes` bounds that for a server, and `complete` says whether it was enough. Within a file,
lines stay in their order, even where a clock was set back; between files, time decides.

Rule: nothing here raises for what is in a file, and every text can be printed (`lines`, `zml.text.ansi`). It reads no
clock.
"""

from __future__ import annotations

import base64
import binascii
import heapq
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from .files import LINE_MOST, Part, Raw, Source, backward, end_of, forward, is_there, sources
from .lines import LEVELS, Line, Wanted, details, failure, parse, searched

__all__ = [
    "LEVELS",
    "BadCursor",
    "Line",
    "Page",
    "Wanted",
    "after",
    "details",
    "failure",
    "members",
    "newest",
    "searched",
    "start",
]

SLACK_S = 60.0  # by which a clock may have been set back; what is before `since` by more is not looked at
ALL = Wanted()
NEVER = -1.0  # before every time that a line may have
CURSOR_BYTES = 4 << 20  # unpacked
PAGE = 1000


class BadCursor(ValueError):
    """A text that is no cursor of ours."""


class Page(NamedTuple):
    """`lines`, the oldest first. `complete`: nothing that is wanted was left out, but for what `most` leaves to the
    next page of `after`, or to a larger one of `newest`."""

    lines: list[Line]
    cursor: str
    complete: bool


Places = dict[str, tuple[int, int]]  # by source: the inode of a part, and up to where it was read


class Found(NamedTuple):
    """A line on its way through the merge; `line` is None for an empty one."""

    source: Source
    part: Part
    raw: Raw
    line: Line | None


# -- the three questions ----------------------------------------------------------------------------------


def newest(folder: Path, wanted: Wanted = ALL, most: int = 200, *, budget_bytes: int | None = None) -> Page:
    """The newest `most` lines that are wanted, and a cursor behind all there is."""
    found = sources(folder)
    ends = {source.key: (source.parts[-1].inode, end_of(source.parts[-1])) for source in found}
    if most < 1:
        return Page([], _pack(ends), complete=True)
    lines: list[Line] = []
    left = budget_bytes
    merged = heapq.merge(
        *(  # of two lines of one time the same comes first, in whatever direction they are read
            _back(source, ends[source.key][1], wanted)
            for source in reversed(found)
            if _may_hold(source, wanted)
        ),
        key=lambda each: -each[0],
    )
    for _, each in merged:
        if each.line is not None and wanted.takes(each.line):
            lines.append(each.line)
            if len(lines) >= most:
                break
        if left is not None and (left := left - (each.raw.end - each.raw.begin)) < 0:
            return Page(lines[::-1], _pack(ends), complete=False)
    return Page(lines[::-1], _pack(ends), complete=True)


def members(folder: Path) -> list[str]:
    """Whose logs there are."""
    return sorted({source.member for source in sources(folder)})


def start(folder: Path, since: float | None = None) -> str:
    """A cursor at the first line, or at the first that is not older than `since`."""
    places: Places = {}
    for source in sources(folder):
        if not source.settled:
            continue  # `after` begins with its first line
        places[source.key] = (source.parts[0].inode, 0)
        if since is not None:
            last = source.parts[-1]
            places[source.key] = (last.inode, end_of(last))
            for _, each in _back(source, places[source.key][1], Wanted(since=since)):
                if each.line is None or each.line.time >= since:
                    places[source.key] = (each.part.inode, each.raw.begin)
    return _pack(places)


def after(
    folder: Path,
    cursor: str,
    wanted: Wanted = ALL,
    most: int = PAGE,
    *,
    budget_bytes: int | None = None,
) -> Page:
    """What follows a cursor, at most so many lines. Files that are new since then are read from their beginning.

    There may be more behind the new cursor where the page is full or not complete. Raises BadCursor.
    """
    before = _unpack(cursor)
    found = sources(folder)
    places: Places = {}
    waiting = []
    for source in found:
        if not source.settled:
            if source.key in before:
                places[source.key] = before[source.key]
            continue  # next time
        at, offset = _place(source, before.get(source.key))
        places[source.key] = (source.parts[at].inode, offset)
        if at + 1 < len(source.parts) or source.parts[at].size > offset:
            waiting.append(_on(source, at, offset))
    lines: list[Line] = []
    left = budget_bytes
    for _, each in heapq.merge(*waiting, key=lambda each: each[0]):
        places[each.source.key] = (each.part.inode, each.raw.end)
        if each.line is not None and wanted.takes(each.line):
            lines.append(each.line)
            if len(lines) >= most:
                break
        if left is not None and (left := left - (each.raw.end - each.raw.begin)) < 0:
            return Page(lines, _pack(places), complete=False)
    return Page(lines, _pack(places), complete=all(source.settled for source in found))


# -- one source -------------------------------------------------------------------------------------------


def _may_hold(source: Source, wanted: Wanted) -> bool:
    """Files of other workers and shards need not be opened: their names say whose they are."""
    name = source.member
    return not wanted.members or name in wanted.members or not (name[:1] in "wp" and name[1:].isdigit())


def _back(source: Source, end: int, wanted: Wanted) -> Iterator[tuple[float, Found]]:
    """Its lines with the time that they are merged by, which never grows, the last line first."""
    latest = float("inf")
    oldest = None if wanted.since is None else wanted.since - SLACK_S
    for part in reversed(source.parts):
        for raw in backward(part, end if part is source.parts[-1] else end_of(part)):
            line = _line(source, raw, min(latest, part.changed))
            if line is not None:
                latest = min(latest, line.time)
            if oldest is not None and latest < oldest:
                return
            yield latest, Found(source, part, raw, line)


def _on(source: Source, at: int, offset: int) -> Iterator[tuple[float, Found]]:
    """Its lines from a place on with the time that they are merged by, which never falls."""
    latest = NEVER
    for number in range(at, len(source.parts)):
        part = source.parts[number]
        for raw in forward(part, offset if number == at else 0):
            line = _line(source, raw, latest)
            if line is not None and line.time == NEVER:  # it has no time, and is before all that have one
                line = msgspec.structs.replace(line, time=part.changed)
            elif line is not None:
                latest = max(latest, line.time)
            yield latest, Found(source, part, raw, line)
        if number + 1 < len(source.parts) and not is_there(part):
            return  # or lines of it would be passed over: the next listing says where it is


def _line(source: Source, raw: Raw, neighbour: float) -> Line | None:
    if raw.text is None:
        what = f"a line of {raw.end - raw.begin:,} bytes is not shown; {LINE_MOST:,} are the most"
        return Line(neighbour, "warning", source.member, "", what)
    return parse(raw.text, source.member, neighbour)


def _place(source: Source, before: tuple[int, int] | None) -> tuple[int, int]:
    """The part to go on with, by its number, and from where. What was rotated away meanwhile is lost."""
    if before is not None:
        inode, offset = before
        for number, part in enumerate(source.parts):
            if part.inode == inode:
                return number, offset if offset <= part.size else 0  # it was cut and begun again
    return 0, 0


# -- cursors ----------------------------------------------------------------------------------------------


def _pack(places: Places) -> str:
    packed = zlib.compress(msgspec.json.encode(places), 1)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def _unpack(cursor: str) -> Places:
    try:
        raw = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        packer = zlib.decompressobj()
        places = msgspec.json.decode(packer.decompress(raw, CURSOR_BYTES), type=Places)
    except (
        UnicodeEncodeError,
        binascii.Error,
        zlib.error,
        msgspec.MsgspecError,
        UnicodeDecodeError,
    ) as error:
        raise BadCursor("this is no place in the logs of a run") from error
    if any(inode < 0 or offset < 0 for inode, offset in places.values()):
        raise BadCursor("this is no place in the logs of a run")
    return places
