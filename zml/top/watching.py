"""The loop of `zml top`: what was seen and what was pressed go in, a picture comes out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial

from rich.console import Console

from .known import Known, Seen
from .picture import body, frame, room
from .screen import CLUSTER_VIEWS, RUN_VIEWS, Screen, press, settled
from .source import Lookout
from .terminal import Terminal

REDRAW_S = 5.0  # without anything new: how old the picture is, is part of it


def watch(lookout: Lookout, first: Seen, terminal: Terminal, *, unicode: bool) -> int:
    """Until somebody has enough; returns 0, or the signal that ended it."""
    root = CLUSTER_VIEWS if first.jobs is not None else RUN_VIEWS
    screen, known, inside = Screen(root, root[0]), Known(), ""
    known.take(first)
    waiting: Seen | None = None  # that came during a pause
    while True:
        width, height = terminal.size
        now = time.time()
        shown = partial(body, known, width=width, height=room(height), unicode=unicode, now=now)
        screen = settled(screen, shown(screen).rows)
        lines = frame(known, screen, shown(screen), width, height, unicode=unicode, now=now)
        terminal.draw(lines, width, height)
        keys, ended = terminal.wait(REDRAW_S)
        if ended:
            return ended
        for key in keys:
            rows = shown(screen).rows
            screen = press(screen, key, rows, inside=bool(inside))
            screen = settled(screen, shown(screen).rows)
            if screen.quit:
                return 0
            if screen.enter or screen.back:
                inside = screen.enter
                lookout.watch(inside)
                views = RUN_VIEWS if inside else root
                screen, known, waiting = Screen(views, views[0]), Known(), None
                break
        seen = lookout.take() or waiting
        if seen is None or seen.inside != inside:
            continue  # a look at what was left meanwhile is none
        if screen.paused:
            waiting = seen
        else:
            waiting = None
            known.take(seen)


def main(lookout: Lookout, first: Seen, console: Console, *, unicode: bool) -> int:
    """On this terminal; returns an exit code."""
    with Terminal(console) as terminal:
        lookout.wake = terminal.wake
        try:
            ended = watch(lookout, first, terminal, unicode=unicode)
        finally:
            lookout.wake = _asleep
    return 128 + ended if ended else 0


def _asleep() -> None:
    return


def speaks_unicode(environment: Mapping[str, str], encoding: str) -> bool:
    """Whether more than ASCII can be shown. Python writes UTF-8 in the C locale, too, and sets LC_CTYPE to that (PEP
    538, 540); whoever says LANG=C means it."""
    if not encoding.lower().startswith("utf"):
        return False
    said = environment.get("LC_ALL") or ""
    if not said:
        kind = environment.get("LC_CTYPE") or ""
        coerced = kind in ("C.UTF-8", "C.utf8", "UTF-8")
        said = environment.get("LANG", "") if coerced or not kind else kind
    return said not in ("C", "POSIX")
