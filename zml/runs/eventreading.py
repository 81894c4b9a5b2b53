"""A run's events, read back from `events.jsonl`: what happened, to whom and why, for people.

The file is read from its end, as far as is asked for, and may grow meanwhile. A line that cannot be read is passed
over; texts are harmless to print.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..logs.reading.files import Part, backward, end_of, forward
from ..logs.reading.lines import read_object, seconds, tame
from ..text.ansi import harmless
from .events import WITHOUT_REASON


class Event(msgspec.Struct, frozen=True):
    at: float  # seconds since the Unix epoch
    what: str  # in words
    member: str = ""
    because: str = ""


class Happened(NamedTuple):
    """Some events, the oldest first, and where to go on in the file."""

    events: list[Event]
    offset: int


def newest(path: Path, most: int | None = None) -> Happened:
    """The newest so many, or all."""
    part = _part(path)
    if part is None:
        return Happened([], 0)
    end = end_of(part)
    events: list[Event] = []
    for raw in backward(part, end) if most != 0 else ():
        event = parse(raw.text)
        if event is not None:
            events.append(event)
            if most is not None and len(events) >= most:
                break
    return Happened(events[::-1], end)


def after(path: Path, offset: int) -> Happened:
    part = _part(path)
    if part is None or part.size <= offset:
        return Happened([], offset)
    events: list[Event] = []
    for raw in forward(part, offset):
        offset = raw.end
        event = parse(raw.text)
        if event is not None:
            events.append(event)
    return Happened(events, offset)


def parse(raw: bytes | None) -> Event | None:
    """None for what is not worth telling, or no event."""
    found = read_object(raw) if raw else None
    at = seconds(found.get("at")) if found is not None else None
    if found is None or at is None:
        return None
    what = _text(found.get("what", found.get("event")))  # of older runs there is only the name of the action
    member = _text(found.get("member") or found.get("worker"))
    because = "" if found.get("event") in WITHOUT_REASON else _text(found.get("because"))
    return Event(at, what, member, because) if what else None


def _text(value: Any) -> str:
    return harmless(" ".join(str(tame(value)).split())) if value is not None else ""


def _part(path: Path) -> Part | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return Part(path, about.st_ino, about.st_size, about.st_mtime)


def as_json(events: Iterable[Event]) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(event) for event in events]
