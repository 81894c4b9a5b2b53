"""What is on the screen, and what a key does to it. Pure: a screen and a key in, a screen out.

Rule: a cursor is a name and not a line, so that it stays on its member while rows are sorted anew around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

RUN_VIEWS = ("overview", "workers", "shards", "events")
CLUSTER_VIEWS = ("jobs", "nodes")
LONGEST_FILTER = 60


@dataclass(frozen=True, slots=True)
class Sort:
    column: str
    reverse: bool = False


@dataclass(frozen=True, slots=True)
class Screen:
    views: tuple[str, ...] = RUN_VIEWS
    view: str = "overview"
    chosen: str = ""  # the row under the cursor, by name
    first: int = 0  # the first row or line that is shown
    sorts: Mapping[str, Sort] = field(default_factory=dict)  # by view; what is missing is by name
    filter: str = ""
    typing: bool = False  # the filter is being written
    paused: bool = False
    help: bool = False
    details: bool = False  # of what was chosen
    quit: bool = False
    enter: str = ""  # a job whose run is to be watched instead
    back: bool = False  # from it to the cluster

    @property
    def scrolls(self) -> bool:
        """Keys move lines, not a cursor."""
        return self.help or self.details or self.view in ("overview", "events")


@dataclass(frozen=True, slots=True)
class Rows:
    """What there is to move in: the names of the view's rows in their order, or so many lines of text."""

    names: Sequence[str] = ()
    lines: int = 0
    columns: Sequence[str] = ()  # that can be sorted by, the first is how it is sorted at first
    page: int = 1  # rows or lines that are seen at once


def press(screen: Screen, key: str, rows: Rows, *, inside: bool = False) -> Screen:
    """What `key` does. `inside`: this run was entered from a cluster, and there is a way back."""
    if screen.typing:
        return _type(screen, key)
    if key == "q":
        return replace(screen, quit=True)
    if screen.help and key in ("?", "esc", "enter", "backspace"):
        return replace(screen, help=False, first=0)
    if key == "?":
        return replace(screen, help=True, first=0)
    if key == "p":
        return replace(screen, paused=not screen.paused)
    if key in _MOVES:
        return _move(screen, key, rows)
    if key in ("tab", "right", "backtab", "left"):
        step = 1 if key in ("tab", "right") else -1
        at = screen.views.index(screen.view)
        return to(screen, screen.views[(at + step) % len(screen.views)])
    if key.isdecimal() and 1 <= int(key) <= len(screen.views):
        return to(screen, screen.views[int(key) - 1])
    if key in ("esc", "backspace"):
        return _leave(screen, inside=inside)
    if screen.help or screen.details:
        return screen
    if key == "/":
        return replace(screen, typing=True, filter="", first=0)
    if key in ("s", "r") and rows.columns:
        return _sort(screen, key, rows.columns)
    if key == "enter" and rows.names and not screen.scrolls:
        if screen.view == "jobs":
            return replace(screen, enter=screen.chosen)
        return replace(screen, details=True, first=0)
    return screen


def to(screen: Screen, view: str) -> Screen:
    """Another view. The filter stays: whoever looks for w7 looks for it in each."""
    return replace(screen, view=view, chosen="", first=0, help=False, details=False)


def settled(screen: Screen, rows: Rows) -> Screen:
    """The cursor on a row that is there, and in sight; no further down than there is something."""
    if screen.scrolls:
        return replace(screen, first=max(0, min(screen.first, rows.lines - rows.page)))
    if not rows.names:
        return replace(screen, chosen="", first=0)
    at = rows.names.index(screen.chosen) if screen.chosen in rows.names else 0
    first = min(max(screen.first, at - rows.page + 1), at, max(0, len(rows.names) - rows.page))
    return replace(screen, chosen=rows.names[at], first=max(0, first))


def sort_of(screen: Screen, columns: Sequence[str]) -> Sort:
    """How the view is sorted, by one of these columns."""
    found = screen.sorts.get(screen.view)
    if found is not None and found.column in columns:
        return found
    return Sort(columns[0]) if columns else Sort("")


_MOVES = {
    "up": -1, "k": -1, "down": 1, "j": 1, "pageup": 0, "pagedown": 0, " ": 0, "home": 0, "g": 0, "end": 0, "G": 0,
}  # fmt: skip


def _move(screen: Screen, key: str, rows: Rows) -> Screen:
    count = rows.lines if screen.scrolls else len(rows.names)
    at = screen.first
    if not screen.scrolls:
        at = rows.names.index(screen.chosen) if screen.chosen in rows.names else 0
    by = {"pageup": -rows.page, "pagedown": rows.page, " ": rows.page, "home": -count, "g": -count}
    at += _MOVES[key] or by.get(key, count)
    if screen.scrolls:
        return settled(replace(screen, first=at), rows)
    if not rows.names:
        return screen
    return settled(replace(screen, chosen=rows.names[max(0, min(at, count - 1))]), rows)


def _type(screen: Screen, key: str) -> Screen:
    if key == "enter":
        return replace(screen, typing=False)
    if key == "esc":
        return replace(screen, typing=False, filter="", first=0)
    if key == "backspace":
        return replace(screen, filter=screen.filter[:-1], first=0)
    if len(key) == 1 and key.isprintable() and len(screen.filter) < LONGEST_FILTER:
        return replace(screen, filter=screen.filter + key, first=0)
    return screen


def _leave(screen: Screen, *, inside: bool) -> Screen:
    if screen.details:
        return replace(screen, details=False, first=0)
    if screen.filter:
        return replace(screen, filter="", first=0)
    return replace(screen, back=True) if inside else screen


def _sort(screen: Screen, key: str, columns: Sequence[str]) -> Screen:
    now = sort_of(screen, columns)
    if key == "r":
        new = replace(now, reverse=not now.reverse)
    else:  # of numbers the largest are looked for, of names the first
        at = (columns.index(now.column) + 1) % len(columns)
        new = Sort(columns[at], reverse=at > 0)
    return replace(screen, sorts={**screen.sorts, screen.view: new}, first=0)
