"""`zml logs` and `zml events`: what the processes of a run say, and what was decided about it. Nobody is asked: it is
all in the run directory, of a run that goes on as of one from last year."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import USAGE, ZmlError

if TYPE_CHECKING:
    from ..logs.reading import Line, Wanted

LOOK_S = 0.5  # between two looks at what grows
AT_ONCE = (
    10_000  # lines that are held; with many files a smaller number would look into each of them too often
)
SILENT = 20  # pages without a line, while files are renamed all the time, until that is all there is
LAST_S = 2.0  # for the last words of processes that end after their job
GONE_S = 10.0  # a coordinator that died may be started again
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def how_many(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """A number, or "all", which is -1."""
    if text is None or text == "all":
        return None if text is None else -1
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    raise click.BadParameter(f"{text} is neither a number nor 'all'")


def since_when(_context: click.Context, _option: click.Parameter, text: str | None) -> float | None:
    """In seconds since the Unix epoch."""
    if text is None:
        return None
    found = moment(text, time.time())
    if found is None:
        raise click.BadParameter(f"{text} is no time: write 5m, 2h, 12:30 or 2026-03-01T12:30")
    return found


def moment(text: str, now: float) -> float | None:
    """5m, 2h30m: so long ago. 12:30, 2026-03-01T12:30: then, in local time, a time of the day the last one that was.
    None for what is no time."""
    from datetime import datetime, timedelta

    if re.fullmatch(r"(?:\d{1,9}(?:\.\d{1,6})?[smhd])+", text):
        return now - sum(
            float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text)
        )
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(?::\d{2})?", text):
            parts = [int(part) for part in text.split(":")]
            today = datetime.fromtimestamp(now)
            then = today.replace(hour=parts[0], minute=parts[1], second=(*parts, 0)[2], microsecond=0)
            return (then if then <= today else then - timedelta(days=1)).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def show(rows: Iterable[str]) -> None:
    """Lines that are not folded, in one piece: somebody may be reading them as they come."""
    if text := "\n".join(rows):
        coding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(coding, "replace").decode(coding) + "\n")
        sys.stdout.flush()


def paint() -> Callable[..., str]:
    """Colours, on a terminal that takes them and where NO_COLOR does not forbid them."""
    from ..text.ansi import coloured
    from ..text.logview import plain

    return click.style if sys.stdout.isatty() and coloured() else plain


def run_folder(run: str | None) -> Path:
    """The run directory that is meant."""
    from ..runs.finding import find
    from .flags import settle

    return find(run, Path(settle({}).settings.runs))


def watch(folder: Path, more: Callable[[], bool]) -> None:
    """Call `more`, which says whether there was anything, until the run is over and all of it was read."""
    from ..runs.finding import look

    quiet_since: float | None = None  # when nothing more came from a run that is over
    while True:
        found = look(folder, time.time())  # before the reading: what is written before its end is read
        some = more()
        if some or found.live:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= (GONE_S if found.state == "cut off" else LAST_S):
            return
        if quiet_since is None and some:
            continue  # there may be more than fits into one look
        time.sleep(LOOK_S)


# -- zml logs ---------------------------------------------------------------------------------------------

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
FOLLOW = click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the run is over.")
RUN = click.argument("run", required=False)


@click.command()
@FOLLOW
@click.option("--worker", "workers", type=click.IntRange(min=0), multiple=True, metavar="K",
              help="Of this worker: its agent, its script and what that prints. May be repeated.")  # fmt: skip
@click.option("--shard", "shards", type=click.IntRange(min=0), multiple=True, metavar="K",
              help="Of this shard. May be repeated.")  # fmt: skip
@click.option("--coordinator", is_flag=True, help="Of the coordinator.")
@click.option("--member", "names", multiple=True, metavar="NAME", help="Of this one: w0, p1, run.")
@click.option("--printed", is_flag=True, help="Only what scripts print.")
@click.option(
    "--level", type=click.Choice(["debug", "info", "warning", "error", "critical"]), help="At least so bad."
)
@click.option("--grep", "text", metavar="TEXT", help="With this text, in capital or small letters.")
@click.option("--regex", metavar="PATTERN", help="In which this regular expression is found.")
@click.option("--steps", metavar="A-B", help="Written at these steps of their worker.")
@click.option(
    "--since",
    callback=since_when,
    metavar="TIME",
    help="5m ago, or since 12:30 or 2026-03-01T12:30; all of them.",
)
@click.option(
    "-n", "most", callback=how_many, metavar="N", help="The newest N lines, or all.  [default: 200]"
)
@AS_JSON
@RUN
def logs(
    run: str | None,
    follow: bool,
    workers: tuple[int, ...],
    shards: tuple[int, ...],
    coordinator: bool,
    names: tuple[str, ...],
    printed: bool,
    level: str | None,
    text: str | None,
    regex: str | None,
    steps: str | None,
    since: float | None,
    most: int | None,
    as_json: bool,
) -> int:
    """What the processes of a run say and its scripts print.

    All of them in order of time: the newest lines, or those that are asked for. What a script prints is marked out or
    err; what looks like a warning or an error there has that level.

    RUN is a path, a run's name below ./runs, or the beginning or end of one; without it, the run that is going on, else
    the newest.
    """
    from ..logs import reading as logreading
    from ..logs.reading import Wanted
    from ..runs import rundir

    folder = run_folder(run)
    members = frozenset(
        [*(f"w{k}" for k in workers), *(f"p{k}" for k in shards), *(["coordinator"] * coordinator), *names]
    )
    wanted = Wanted(
        members=members,
        level=level or "debug",
        text=text or "",
        pattern=compiled(regex),
        since=since,
        steps=step_range(steps),
        printed=printed,
    )
    place = folder / rundir.LOGS
    printer = Printer(as_json)
    if most is None:
        most = -1 if since is not None else 200
    if most < 0:
        cursor, silent = logreading.start(place, since), 0
        while silent < SILENT:
            page = logreading.after(place, cursor, wanted, AT_ONCE)
            printer.print(page.lines)
            cursor = page.cursor
            silent = 0 if page.lines else SILENT if page.complete else silent + 1
    else:
        page = logreading.newest(place, wanted, most)
        printer.print(page.lines)
        cursor = page.cursor

    def more() -> bool:
        nonlocal cursor
        page = logreading.after(place, cursor, wanted)
        cursor = page.cursor
        printer.print(page.lines)
        return bool(page.lines)

    if follow:
        watch(folder, more)
    elif not printer.printed:
        explain_nothing(folder, wanted)
    return 0


def explain_nothing(folder: Path, wanted: Wanted) -> None:
    """On standard error: whoever filters wants to know that there is something else."""
    from ..logs import reading as logreading
    from ..runs import rundir
    from ..text.console import names, near

    there = logreading.members(folder / rundir.LOGS)
    if not there:
        said = f"no logs in {near(str(folder))}"
    elif wanted.members and not wanted.members & set(there):
        said = f"no logs of {names(sorted(wanted.members))} in {near(str(folder))}; it has {names(there, 12)}"
    else:
        said = f"no line in {near(str(folder))} fits"
    click.echo(f"zml: {said}", err=True)


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except (re.error, OverflowError, RecursionError) as error:
        raise ZmlError(
            USAGE, f"--regex {pattern} is no regular expression: {error}", "--grep takes any text."
        ) from None


def step_range(text: str | None) -> tuple[int, int] | None:
    """Of 100-200, 100-, -200 or 100; both ends belong to it."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{0,15})(-?)(\d{0,15})", text)
    if match is None or not (match[1] or match[3]):
        raise ZmlError(USAGE, f"--steps {text} is no range of steps", "Write 100-200, 100- or 100.")
    first = int(match[1] or 0)
    return first, (int(match[3]) if match[3] else 2**63) if match[2] else first


class Printer:
    """Prints lines as they come; the column of the members grows with the longest name so far."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.paint = paint()
        self.width = 2
        self.printed = 0

    def print(self, lines: list[Line]) -> None:
        from ..logs import outlets as logs
        from ..text import logview

        if not lines:
            return
        self.printed += len(lines)
        if self.as_json:
            show(logs.encode(logview.as_json(line)).decode() for line in lines)
            return
        self.width = max(self.width, *(min(len(line.member), 16) for line in lines))
        now = time.localtime()
        today = (now.tm_year, now.tm_yday)
        show(row for line in lines for row in logview.rows(line, today, self.width, self.paint))


# -- zml events -------------------------------------------------------------------------------------------


@click.command()
@FOLLOW
@click.option("-n", "most", callback=how_many, metavar="N", help="The newest N, or all.  [default: all]")
@AS_JSON
@RUN
def events(run: str | None, follow: bool, most: int | None, as_json: bool) -> int:
    """What was decided about a run, and why.

    Who came and went, where the parameters are, how it ended.

    RUN is a path, a run's name below ./runs, or the beginning or end of one; without it, the run that is going on, else
    the newest.
    """
    from ..logs import outlets as logs
    from ..runs import eventreading, rundir
    from ..text.console import near
    from ..text.logview import clock, colour, flat

    folder = run_folder(run)
    path = folder / rundir.EVENTS
    painted = paint()

    def row(event: eventreading.Event) -> str:
        if as_json:
            return logs.encode({"time": logs.stamp(event.at), **eventreading.as_json([event])[0]}).decode()
        now = time.localtime()
        when = painted(clock(event.at, (now.tm_year, now.tm_yday)), dim=True)
        who = painted(event.member.ljust(4), fg=colour(event.member))
        because = f": {event.because}" if event.because else ""
        return f"{when} {who} {' '.join(flat(event.what + because))}"

    happened = eventreading.newest(path, None if most is None or most < 0 else most)
    show(row(event) for event in happened.events)
    if not happened.events and not follow and not as_json:
        click.echo(f"zml: no events in {near(str(folder))}", err=True)
    offset = happened.offset

    def more() -> bool:
        nonlocal offset
        came = eventreading.after(path, offset)
        offset = came.offset
        show(row(event) for event in came.events)
        return bool(came.events)

    if follow:
        watch(folder, more)
    return 0
