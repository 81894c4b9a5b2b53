"""The whole screen as lines: a headline, the views, one view's body, and what keys there are. Pure.

`frame` gives exactly as many lines as the terminal has, none wider than it. `plain` is one picture of everything, for
files and for `--once`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from ..text import bars, console
from ..text.console import cropped, duration, spread
from . import cluster, members, overview
from .known import Known
from .screen import Rows, Screen, sort_of
from .table import Column, header, line, ordered, sortable

ABOVE = 2  # lines: headline and views
BELOW = 1
NARROWEST, LOWEST = 20, 5
KEYS = (
    ("q", "quit"),
    ("tab", "views"),
    ("j/k", "move"),
    ("enter", "details"),
    ("s", "sort"),
    ("r", "reverse"),
    ("/", "filter"),
    ("p", "pause"),
    ("?", "help"),
)
HELP = """\
zml top: watching a job, or a cluster of jobs

  q, Ctrl-C       quit; the job goes on
  1 2 3 4, tab    another view; shift-tab, left and right, too
  j k, arrows     move; page up and down, space, g, G
  enter           everything about a worker or shard; of a cluster, into a job
  esc             back; also drops the filter
  s               sort by the next column
  r               the other way round
  /               show only rows with these letters; enter ends, esc drops them
  p               pause: the picture stands, and goes on with p
  Ctrl-Z          back to the shell; fg comes back

Bars of a step, all on one scale:
  d data          waiting for the script's own loader
  c compute       forward, backward and all else the script does
  e encode        gradients made into bytes
  w wait          for other workers, shards and the network
  a apply         parameters written into the model

In sync all steps last as long as the slowest worker's. The straggler is the
one that waits least: the column "where it goes" sorts by time without waiting.

slow 2.1x, compute   its own part of a step is 2.1 times the others' median
starving, data 40%   so much of each step waits for the loader
saved in / out       share of the bytes that compression kept from travelling
""".splitlines()


@dataclass(frozen=True, slots=True)
class Body:
    """One view: its lines, the first few of which stay where they are, and what keys move in."""

    fixed: Sequence[Text]
    lines: Sequence[Text]
    rows: Rows


def body(
    known: Known, screen: Screen, width: int, height: int, *, unicode: bool = True, now: float = 0.0
) -> Body:
    """What the screen shows, all of it; `height` is the room for it."""
    if screen.help:
        return _text([cropped(each, width) for each in HELP], height)
    if screen.view == "jobs":
        return _jobs(known, screen, width, height, now)
    if screen.view == "nodes":
        return _nodes(known, screen, width, height)
    if known.status is None:
        return _text([], height)
    if screen.details:
        return _text(list(members.details(known, screen.chosen, width, unicode=unicode)), height)
    if screen.view == "workers":
        rows = members.workers(known)
        note = bars.legend()
        note.truncate(width)
        return _table(rows, members.W, screen, width, height, members.kept(rows, screen.filter), (note,))
    if screen.view == "shards":
        held = members.shards(known)
        return _table(held, members.S, screen, width, height, members.kept(held, screen.filter))
    if screen.view == "events":
        return _text(overview.events(known.status, screen.filter, width), height)
    return _text(list(overview.lines(known, width, unicode=unicode)), height)


def _text(lines: list[Text], height: int) -> Body:
    return Body((), lines, Rows(lines=len(lines), page=max(1, height)))


def _table(
    rows: Sequence[Any],
    columns: list[Column[Any]],
    screen: Screen,
    width: int,
    height: int,
    kept: Sequence[str],
    above: Sequence[Text] = (),
) -> Body:
    there = frozenset(kept)
    pairs = [(row.member.member, row) for row in rows if row.member.member in there]
    return _rows(pairs, columns, screen, width, height, above)


def _rows(
    pairs: Sequence[tuple[str, Any]],
    columns: list[Column[Any]],
    screen: Screen,
    width: int,
    height: int,
    above: Sequence[Text] = (),
) -> Body:
    names = sortable(columns)
    sort = sort_of(screen, names)
    by_row = {id(row): name for name, row in pairs}
    drawn, order = [], []
    for row in ordered([row for _, row in pairs], columns, sort):
        name = by_row[id(row)]
        chosen = name == screen.chosen
        order.append(name)
        drawn.append(Text.assemble(("»" if chosen else " "), line(columns, row, width - 1, chosen=chosen)))
    head = Text.assemble(" ", header(columns, width - 1, sort))
    fixed = [*above, head]
    return Body(fixed, drawn, Rows(order, len(drawn), names, max(1, height - len(fixed))))


def _jobs(known: Known, screen: Screen, width: int, height: int, now: float) -> Body:
    jobs = cluster.kept_jobs(known.seen.jobs or (), screen.filter)
    return _rows([(job.id, job) for job in jobs], cluster.columns(now), screen, width, height)


def _nodes(known: Known, screen: Screen, width: int, height: int) -> Body:
    nodes = cluster.kept_nodes(known.seen.nodes, screen.filter)
    return _rows([(node.id, node) for node in nodes], cluster.NODES, screen, width, height)


# -- the screen ----------------------------------------------------------------------------------------------


def room(height: int) -> int:
    """Lines for the body."""
    return max(1, height - ABOVE - BELOW)


def frame(
    known: Known,
    screen: Screen,
    shown: Body,
    width: int,
    height: int,
    *,
    unicode: bool = True,
    now: float = 0.0,
) -> list[Text]:
    """`shown` is the body of this screen, made for `room(height)` lines."""
    if width < NARROWEST or height < LOWEST:
        return [cropped("too small", max(1, width))] + [Text()] * (height - 1)
    free = room(height) - len(shown.fixed)
    visible = list(shown.lines[screen.first : screen.first + max(0, free)])
    if not shown.lines:
        visible = [cropped(nothing(known, screen), width, "dim")]
    middle = [*shown.fixed, *visible][: room(height)]
    middle += [Text()] * (room(height) - len(middle))
    lines = [headline(known, screen, width), tabs(known, screen, width, now), *middle,
             bottom(screen, shown, free, width)]  # fmt: skip
    fitted = [_fit(each, width) for each in lines]
    return fitted if unicode else [bars.ascii_only(each) for each in fitted]


def headline(known: Known, screen: Screen, width: int) -> Text:
    if screen.view in ("jobs", "nodes"):
        return cropped(cluster.summary(known.seen.jobs or (), known.seen.nodes), width, "bold")
    status = known.status
    if status is None:
        return cropped("zml top", width, "bold")
    elapsed = duration(status.at - status.started_at) if status.started_at else ""
    style = console.STATE_STYLES.get(status.state, "yellow")
    right = Text.assemble((status.state.lower(), style), f"  {elapsed}")
    return spread(Text(console.headline(status), style="bold"), right, width)


def tabs(known: Known, screen: Screen, width: int, now: float) -> Text:
    """The views, and at the right where the picture comes from, if that is not as it should be."""
    left = Text()
    for number, view in enumerate(screen.views, 1):
        named = f" {number} {view.capitalize()} "
        left.append(
            f"[{named.strip()}]" if view == screen.view else named,
            "reverse" if view == screen.view else "dim",
        )
    right = Text()
    if screen.paused:
        right = Text("paused, p goes on", style="bold yellow")
    elif known.seen.trouble:
        right = cropped(known.seen.trouble, max(10, width - left.cell_len - 2), "bold yellow")
    elif known.status is not None and not known.status.over and screen.views[0] == "overview":
        old = now - known.status.at
        right = Text(f"as of {duration(old)} ago", style="bold yellow") if old >= 10 else Text()
    return spread(left, right, width) if right else _fit(left, width)


def nothing(known: Known, screen: Screen) -> str:
    """Why there is nothing to be seen."""
    if screen.filter:
        return f"nothing here has {screen.filter!r} in it; esc drops the filter"
    if screen.view == "jobs":
        return "there is no job that is not over; `zml submit` brings one"
    if screen.view == "nodes":
        return "no node has come; `zml node` on a machine brings it"
    if known.status is None:
        return known.seen.trouble or "asking ..."
    return {"workers": "no worker has come yet", "shards": "no shard has come yet"}.get(
        screen.view, "nothing yet"
    )


def bottom(screen: Screen, shown: Body, free: int, width: int) -> Text:
    """The filter while it is written, else the keys, and at the right how much there is."""
    if screen.typing:
        return _fit(
            Text.assemble(
                ("/", "bold"), screen.filter, ("_", "blink"), ("   enter keeps it, esc drops it", "dim")
            ),
            width,
        )
    count = len(shown.lines)
    last = min(count, screen.first + max(0, free))
    right = Text(f"{screen.first + 1}-{last} of {count}" if count > free else "", style="bold")
    if screen.filter:
        right = Text.assemble((f"/{screen.filter}", "yellow"), "  ", right)
    text = Text()
    for key, what in KEYS:
        piece = Text.assemble((key, "bold"), f" {what}")
        if text.cell_len + piece.cell_len + 2 + right.cell_len + (1 if right else 0) > width:
            continue
        text.append("  " if text else "").append_text(piece)
    return spread(text, right, width) if right else _fit(text, width)


def _fit(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text


# -- one picture ---------------------------------------------------------------------------------------------


def plain(known: Known, width: int, *, unicode: bool = True, now: float = 0.0) -> list[Text]:
    """Everything once, as long as it is."""
    if known.seen.jobs is not None:
        screen = Screen(("jobs", "nodes"), "jobs", sorts={})
        lines = [headline(known, screen, width)]
        parts = [screen, replace(screen, view="nodes")]
    else:
        screen = Screen()
        lines = [headline(known, screen, width)]
        parts = [screen, replace(screen, view="workers"), replace(screen, view="shards")]
    if known.seen.trouble:
        lines.append(cropped(known.seen.trouble, width, "yellow"))
    for part in parts:
        found = body(known, part, width, 10_000, unicode=unicode, now=now)
        if part is not parts[0] or known.seen.jobs is not None:
            lines.append(Text())
        lines += [*found.fixed, *found.lines] if found.lines else [cropped(nothing(known, part), width)]
    for each in lines:
        each.rstrip()
    return lines if unicode else [bars.ascii_only(each) for each in lines]
