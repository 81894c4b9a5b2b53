"""Log lines for the eyes. Pure: lines in, text out.

    12:03:11.482 w3   warning  peer lost  peer=p0 because="it was silent for 1.5 s"
    12:03:12.001 w3   out      epoch 1/5: loss 2.31

Whose line it is and how bad are in columns; what a script prints has its stream in place of an "info". A message of
several lines, and the frames of an exception, go on below, indented, so that no text can pass for a line of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..logs.outlets import stamp
from ..logs.reading import LEVELS, Line, details, failure

STREAMS = {"stdout": "out", "stderr": "err"}
STYLES: dict[str, dict[str, Any]] = {
    "debug": {"dim": True},
    "warning": {"fg": "yellow"},
    "error": {"fg": "red"},
}
STYLES["critical"] = {"fg": "red", "bold": True}
COLOURS = ("cyan", "green", "magenta", "blue", "bright_cyan", "bright_green", "bright_magenta", "bright_blue")
LEVEL_WIDTH = max(len(level) for level in LEVELS)
INDENT = "    "

Paint = Callable[..., str]  # as click.style


def plain(text: str, **_style: Any) -> str:
    return text


def clock(at: float, today: tuple[int, int]) -> str:
    """12:03:11.482 of today, else with the day. `today` is year and day of the year."""
    whole = time.localtime(at)
    fraction = f".{int(at % 1 * 1000):03}"
    same = (whole.tm_year, whole.tm_yday) == today
    return time.strftime("%H:%M:%S" if same else "%Y-%m-%d %H:%M:%S", whole) + fraction


def colour(member: str) -> str:
    """The same for a member in every run."""
    number = int(member[1:]) if member[1:].isdigit() and len(member) < 9 else sum(map(ord, member))
    return COLOURS[(number + (member[:1] == "p") * 4) % len(COLOURS)]


def rows(line: Line, today: tuple[int, int], width: int, paint: Paint = plain) -> Iterable[str]:
    """The lines of a line; members have at least `width` columns."""
    stream = STREAMS.get(str(line.fields.get("stream", "")), "")
    level = stream if stream and line.level == "info" else line.level
    style = STYLES.get(line.level, {})
    head = (
        f"{paint(clock(line.time, today), dim=True)} "
        f"{paint(line.member.ljust(width), fg=colour(line.member))} {paint(level.ljust(LEVEL_WIDTH), **style)}"
    )
    first, *more = flat(line.message)
    about = [] if stream else details(line)
    if not stream and line.step is not None:
        about.insert(0, f"step={line.step}")
    told = paint(first, **style) if line.level != "info" else first
    yield " ".join(
        [head, told, *([paint(" ".join(flat(" ".join(about))), dim=True)] if about else [])]
    ).rstrip()
    for text in (*more, *(row for each in failure(line) for row in flat(each))):
        yield INDENT + text


def flat(text: str) -> list[str]:
    """Its lines, tabs made spaces; at least one."""
    return text.expandtabs(4).rstrip("\n").split("\n")


def as_json(line: Line) -> dict[str, Any]:
    """As it stood in its file."""
    return {
        "time": stamp(line.time),
        "level": line.level,
        "message": line.message,
        "role": line.role,
        "id": line.member,
        **line.fields,
    }
