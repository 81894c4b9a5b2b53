"""How an examination is told: a line for each thing, what to do below it, a count at the end.

Texts come from other machines: nothing in them moves a cursor.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

import click

from ..text.ansi import printable
from .findings import Check

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}
NAME = 14  # columns of a name
Paint = Callable[[str], str]


def plain(verdict: str) -> str:
    return verdict


def coloured(verdict: str) -> str:
    return click.style(verdict, fg=COLOURS[verdict])


def lines(checks: Sequence[Check], width: int, paint: Paint = plain) -> Iterator[str]:
    """The checks as they are, and their count."""
    for check in checks:
        yield from entry(check, width, paint)
    yield ""
    yield count(checks)


def entry(check: Check, width: int, paint: Paint) -> Iterator[str]:
    """One check, its fix below. Lines are wrapped, but words, which may be commands and paths, are not cut."""
    room = max(width - NAME - 8, 20)
    found = f"{check.where}: {check.found}" if check.where else check.found
    head = f"{paint(check.verdict)}  {check.name:<{NAME}}"
    for text in wrapped(found, room):
        yield f"{head}  {text}".rstrip()
        head = " " * (NAME + 6)
    for text in wrapped(check.fix, room) if check.fix else ():
        yield f"{' ' * (NAME + 6)}  {text}"


def wrapped(text: str, room: int) -> list[str]:
    return textwrap.wrap(printable(text), room, break_long_words=False, break_on_hyphens=False) or [""]


def count(checks: Sequence[Check]) -> str:
    number = {verdict: sum(check.verdict == verdict for check in checks) for verdict in COLOURS}
    warnings = "1 warning" if number["warn"] == 1 else f"{number['warn']} warnings"
    return f"{number['pass']} passed, {warnings}, {number['fail']} failed"
