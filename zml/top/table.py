"""Rows as lines of a given width. Where there is no room for all columns, those that matter least are left out.

Pure: it knows neither jobs nor terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text

from ..text.ansi import printable
from .screen import Sort

R = TypeVar("R")
Key = float | tuple[str, int, str] | str | None


@dataclass(frozen=True)
class Column(Generic[R]):
    """`rank` says how much it matters: 0 is always shown. `cell` gets the row and the width it has. A column that grows
    takes what the others leave, up to `most`; who may grow most, first."""

    name: str
    width: int
    rank: int
    cell: Callable[[R, int], Text | str]
    key: Callable[[R], Key] | None = None  # None: it cannot be sorted by
    right: bool = False
    most: int = 0  # 0: it does not grow
    title: str | None = None

    @property
    def head(self) -> str:
        return self.name if self.title is None else self.title


def sortable(columns: Sequence[Column[R]]) -> list[str]:
    return [column.name for column in columns if column.key is not None]


def ordered(rows: Sequence[R], columns: Sequence[Column[R]], sort: Sort) -> list[R]:
    """By the column; rows of which it is not known come last, whichever way."""
    column = next((each for each in columns if each.name == sort.column), None)
    if column is None or column.key is None:
        return list(rows)
    keys = [(column.key(row), row) for row in rows]
    known = sorted(((key, row) for key, row in keys if key is not None), key=lambda pair: pair[0],
                   reverse=sort.reverse)  # fmt: skip
    return [row for _, row in known] + [row for key, row in keys if key is None]


def widths(columns: Sequence[Column[R]], width: int) -> dict[str, int]:
    """Of the columns for which there is room, by name; a space stands between two."""
    shown: dict[str, int] = {}
    left = width
    for column in sorted(columns, key=lambda each: each.rank):
        if column.rank and column.width + 1 > left:
            continue
        shown[column.name] = column.width
        left -= column.width + 1
    left += 1
    for column in sorted(columns, key=lambda each: -each.most):  # who may grow most, first
        if column.most and column.name in shown and left > 0:
            more = min(left, column.most - column.width)
            shown[column.name] += more
            left -= more
    return {column.name: shown[column.name] for column in columns if column.name in shown}


def header(columns: Sequence[Column[R]], width: int, sort: Sort) -> Text:
    line = Text(no_wrap=True)
    room = widths(columns, width)
    for column in columns:
        if column.name not in room:
            continue
        sorts = column.name == sort.column
        # An arrow only where it does not hide the name.
        mark = ("▼" if sort.reverse else "▲") if sorts and len(column.head) < room[column.name] else ""
        text = Text(f"{column.head}{mark}", style="bold underline" if sorts else "bold")
        _put(line, text, room[column.name], right=column.right)
    line.truncate(width)
    return line


def line(columns: Sequence[Column[R]], row: R, width: int, *, chosen: bool = False) -> Text:
    """One row, exactly as wide as it says where it is the chosen one."""
    drawn = Text(no_wrap=True)
    room = widths(columns, width)
    for column in columns:
        if column.name not in room:
            continue
        cell = column.cell(row, room[column.name])
        _put(
            drawn,
            Text(printable(cell)) if isinstance(cell, str) else cell,
            room[column.name],
            right=column.right,
        )
    drawn.truncate(width)
    if chosen:
        drawn.pad_right(max(0, width - drawn.cell_len))
        drawn.stylize("reverse")
    else:
        drawn.rstrip()
    return drawn


def _put(line: Text, cell: Text, width: int, *, right: bool) -> None:
    if line.plain:
        line.append(" ")
    cell.truncate(width, overflow="ellipsis")
    space = " " * (width - cell.cell_len)
    line.append_text(Text.assemble(space, cell) if right else Text.assemble(cell, space))
