"""A job's status for the eyes: one live block on a terminal, plain lines anywhere else.

Rules: one block for the whole job, never one per worker; off a terminal never a carriage return and seldom a
line; colour only where NO_COLOR does not forbid it. What is drawn is a pure function of the status; the two
viewers at the end are the only part that writes.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..figures import PHASES
from ..status import DataStatus, EventLine, JobStatus, MemberStatus, RateStatus, since_the_first
from .ansi import printable

ROWS = 8  # members that are shown one by one; of the others there is a count
EVENTS = 3
PLAIN_EVERY_S = 30.0
PLAIN_EVERY = 0.05  # of the whole job
PATIENCE_S = (
    5.0  # who is waited for is worth a line after this long: in sync mode somebody always is, for a moment
)
WIDEST = 100
LEAST_BAR = 4

STATE_STYLES = {"RUNNING": "green", "SUCCEEDED": "green", "FAILED": "bold red", "CANCELLED": "yellow"}
HERE = frozenset({"active", "joined"})
TROUBLED = frozenset({"failed", "lost"})


def duration(seconds: float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    whole = max(0, int(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def number(value: float | None) -> str:
    return f"{value:.4g}" if value is not None else "not finite"


def names(members: list[str], most: int = 4) -> str:
    shown = ", ".join(members[:most])
    return f"{shown} and {len(members) - most} more" if len(members) > most else shown


def waiting(whom: list[str]) -> str:
    """Names, or the sentence that somebody who knows better has made of them."""
    said = names(whom)
    return said if said.startswith("waiting for ") else f"waiting for {said}"


def near(path: str) -> str:
    """A path as a person in the working folder would write it."""
    here = Path.cwd()
    return os.path.relpath(path, here) if Path(path).is_relative_to(here) else path


def headline(status: JobStatus) -> str:
    script = status.script.rpartition("/")[2] or status.job
    return (
        f"{printable(script)} · {status.mode} · {counted(status.workers, 'worker')}, "
        f"{counted(status.shards, 'shard')}"
    )


def here(status: JobStatus) -> str:
    """While the cluster forms: how much of it is there."""
    workers = f"{len(status.of('worker'))} of {counted(status.workers, 'worker')}"
    return f"{workers} and {len(status.of('shard'))} of {counted(status.shards, 'shard')} here"


def figures(status: JobStatus) -> list[str]:
    """The numbers of a line, the script's own values first."""
    status = since_the_first(status)
    parts = [f"{printable(name)} {number(value)}" for name, value in status.values.items()]
    if status.samples_per_s > 0:
        parts.append(f"{status.samples_per_s:,.0f} samples/s")
    if status.steps:
        parts.append(f"step {status.steps:,}")
    if status.mode != "sync" and status.steps:
        parts.append(f"staleness {status.staleness}")
    if status.rate is not None and status.steps:
        parts.append(f"lr x {status.rate.factor * status.rate.damping:.3g}")
    return parts


def rate(status: RateStatus) -> str:
    """What becomes of the script's learning rate, and why; empty where nothing is known yet."""
    parts = []
    if status.because:
        parts.append(f"x {status.factor:.3g}, {status.because}")
    if status.staleness:
        parts.append(f"x {status.damping:.3g} on average, gradients are {status.staleness:.1f} updates late")
    return f"learning rate {'; '.join(parts)}" if parts else ""


def data(status: DataStatus, *, over: bool = False) -> str:
    """What became of the batches of the open epoch; empty while nobody knows how many there are. Of a job that is
    `over` no worker has any."""
    if not status.batches:
        return ""
    parts = [
        f"{status.committed:,} of {status.batches:,} {'batch' if status.batches == 1 else 'batches'} applied"
    ]
    for count, what in (
        (0 if over else status.leased, "with workers"),
        (status.skipped, "skipped"),
        (status.batches - status.committed - status.skipped if over else 0, "not done"),
        (status.reissued, "dealt again"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return ", ".join(parts)


def checkpoint(status: JobStatus) -> str:
    """The newest that is complete, and whether the last one failed; empty where there was none."""
    newest = status.checkpoint
    parts = []
    if newest.path:
        old_s = status.at - newest.at
        over = status.over or status.state == "CUT OFF"
        when = f"{duration(old_s)} {'before the end' if over else 'ago'}"
        parts.append(f"step {newest.step:,}, {'at the end' if over and old_s < 1 else when}")
    if newest.because:
        parts.append(f"the last one failed: {newest.because}")
    return "; ".join(parts)


def compress(status: JobStatus) -> str:
    """What `--compress auto` has come to, of each worker where they differ; empty where it was not asked for."""
    told = {
        m.member: m.figures.compress
        for m in status.of("worker")
        if m.figures is not None and m.figures.compress
    }
    settings = set(told.values())
    if len(settings) > 1:
        return "auto: " + ", ".join(f"{member} {setting}" for member, setting in sorted(told.items()))
    return "".join(f"auto: {setting}" for setting in settings)


def ended(status: JobStatus) -> str:
    """When it was over, in local time; empty where it is not."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.at)) if status.over else ""


def step_time(status: JobStatus) -> str:
    """Where the time of a mean step goes, since the scripts began; empty where no worker has told."""
    told = [m.figures for m in status.of("worker") if m.figures is not None and m.figures.steps]
    steps = sum(figures.steps for figures in told)
    spent = {name: sum(figures.phases.get(name, 0.0) for figures in told) for name in PHASES}
    whole = sum(spent.values())
    if not steps or whole <= 0:
        return ""
    shares = ", ".join(f"{name} {spent[name] / whole:.0%}" for name in PHASES if spent[name] > 0)
    return f"{1e3 * whole / steps:,.1f} ms: {shares}"


def event_text(event: EventLine) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.at))
    who = f"{event.member} " if event.member else ""
    because = f": {event.because}" if event.because else ""
    return printable(f"{clock} {who}{event.what}{because}")


# -- the block of a terminal -----------------------------------------------------------------------------


def block(status: JobStatus, width: int, *, unicode: bool = True, full: bool = False) -> Group:
    """The live block, at most `width` columns wide; `full` has more, for one who looks once."""
    return Group(*block_lines(status, min(width, WIDEST), unicode=unicode, full=full))


def block_lines(status: JobStatus, width: int, *, unicode: bool = True, full: bool = False) -> Iterator[Text]:
    status = since_the_first(status)
    state = status.state.lower()
    elapsed = duration(status.at - status.started_at) if status.started_at else ""
    right = Text.assemble((state, STATE_STYLES.get(status.state, "yellow")), f"  {elapsed}")
    yield spread(Text(headline(status), style="bold"), right, width)

    progress = status.progress
    if progress is not None:
        left = f"epoch {min(status.epoch + 1, status.epochs)}/{status.epochs} "
        eta = f"  eta {duration(status.eta_s)}" if status.eta_s is not None and not status.over else ""
        share = f" {100 * progress:3.0f} %"
        if len(left) + LEAST_BAR + len(share) + len(eta) <= width:  # one of years may not fit
            share += eta
        line = Text.assemble(left, bar(progress, width - len(left) - len(share), unicode=unicode), share)
        line.truncate(width)
        yield line
    parts = figures(status)
    if parts:
        yield cropped("   ".join(parts), width)
    elif status.state == "FORMING":
        yield cropped(here(status), width)
    if status.rate is not None and (told := rate(status.rate)):
        yield cropped(told, width)
    if status.noise.scale is not None:
        yield cropped(f"gradient noise scale {status.noise.scale:,.0f} samples", width, "dim")
    if full:
        for key, said in (
            ("a step takes", step_time(status)),
            ("compress", compress(status)),
            ("data", data(status.data, over=status.over)),
            ("checkpoint", checkpoint(status)),
            ("ended", ended(status)),
        ):
            if said:
                yield cropped(f"{key} {said}", width)
    if status.state not in ("RUNNING", "FORMING") and status.because:
        yield cropped(status.because, width)

    shown = sorted(status.members, key=lambda m: m.state not in TROUBLED)[
        :ROWS
    ]  # whoever is in trouble first
    for member in sorted(shown, key=lambda m: (m.role != "worker", len(m.member), m.member)):
        yield row(member, width)
    hidden = len(status.members) - len(shown)
    if hidden:
        yield cropped(f"  and {hidden} more that are well", width, "dim")
    if status.waiting_for:
        yield cropped(waiting(status.waiting_for), width, "yellow")
    for event in status.events[-EVENTS:]:
        yield cropped(event_text(event), width, "dim")


def row(member: MemberStatus, width: int) -> Text:
    name = member.member if member.incarnation <= 1 else f"{member.member}#{member.incarnation}"
    steps = f"step {member.steps:,}" if member.steps >= 0 else ""
    heard = f"heard {member.heard_s:.1f} s ago" if member.heard_s >= 0.0 and member.state in HERE else ""
    line = f"  {name:<5} {member.state:<8} {steps:<14} "
    if member.state in TROUBLED:
        return cropped(line + member.because, width, "red")
    return cropped(f"{line}{member.device:<7} {printable(member.node)[:16]:<16} {heard}", width)


def bar(share: float, width: int, *, unicode: bool) -> Text:
    full, empty = ("━", "─") if unicode else ("=", "-")  # to be told apart without colour too
    width = max(width, LEAST_BAR)
    done = round(share * width)
    return Text.assemble((full * done, "green"), (empty * (width - done), "bright_black" if unicode else ""))


def spread(left: Text, right: Text, width: int) -> Text:
    room = max(1, width - right.cell_len - 1)
    left.truncate(room, overflow="ellipsis")
    return Text.assemble(left, " " * max(1, width - left.cell_len - right.cell_len), right)


def cropped(text: str, width: int, style: str = "") -> Text:
    line = Text(printable(text), style=style, no_wrap=True)
    line.truncate(width, overflow="ellipsis")
    line.rstrip()
    return line


# -- lines -----------------------------------------------------------------------------------------------


def progress_line(status: JobStatus) -> str:
    parts = []
    if status.epochs:
        parts.append(f"epoch {min(status.epoch + 1, status.epochs)}/{status.epochs}")
    if status.progress is not None:
        parts.append(f"{100 * status.progress:.0f} %")
    parts += figures(status)
    parts.append(counted(sum(member.state in HERE for member in status.of("worker")), "worker"))
    if status.eta_s is not None:
        parts.append(f"eta {duration(status.eta_s)}")
    return f"[{duration(status.at - status.started_at)}] " + ", ".join(parts)


class Lines:
    """Decides which lines a stream of statuses is worth. Pure: time is the statuses' own `at`."""

    def __init__(self) -> None:
        self.state = ""
        self.here = ""
        self.event_at = 0.0
        self.line_at = 0.0
        self.line_progress = 0.0
        self.waited: tuple[list[str], float, bool] = ([], 0.0, False)  # for whom, since when, already said

    def update(self, status: JobStatus) -> list[str]:
        lines: list[str] = []
        if not self.state:
            lines.append(headline(status))
        if status.state == "FORMING" and here(status) != self.here:
            self.here = here(status)
            lines.append(self.here)
        told = [event for event in status.events if event.at > self.event_at]
        self.event_at = max((event.at for event in told), default=self.event_at)
        lines += [event_text(event) for event in told]
        if status.state != self.state:
            known = any(status.because == event.because for event in told)  # the line would only repeat it
            if (self.state or status.state != "FORMING") and not known:
                because = f": {status.because}" if status.because else ""
                lines.append(printable(f"{status.state.lower()}{because}"))
            self.state = status.state
            self.line_at = max(self.line_at, status.at)
        lines += self._waiting(status)
        progress = status.progress or 0.0
        due = status.at - self.line_at >= PLAIN_EVERY_S or progress - self.line_progress >= PLAIN_EVERY
        if (
            due
            and status.state in ("RUNNING", "DRAINING")
            and (status.values or status.steps or status.epochs)
        ):
            self.line_at, self.line_progress = status.at, progress
            lines.append(progress_line(status))
        return lines

    def _waiting(self, status: JobStatus) -> list[str]:
        whom, since, said = self.waited
        if status.waiting_for != whom:
            self.waited = (list(status.waiting_for), status.at, False)
            return []
        if not whom or said or status.at - since < PATIENCE_S:
            return []
        self.waited = (whom, since, True)
        return [printable(f"{waiting(whom)} (for {duration(status.at - since)})")]


# -- viewers ---------------------------------------------------------------------------------------------


class Viewer(Protocol):
    """Where a launcher shows its job."""

    def show(self, status: JobStatus) -> None:
        """This is the status now."""

    def script_line(self, line: str) -> None:
        """A line that a script printed."""

    def say(self, line: str) -> None:
        """A line of the launcher's own."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


def pass_on(line: str, out: TextIO) -> None:
    """Write a script's line. A reader that has gone (`zml run x.py | head`) costs its lines and not the job."""
    try:
        print(line, file=out, flush=True)
    except BrokenPipeError:
        try:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), out.fileno()
            )  # for what is buffered, and the lines to come
        except OSError:  # it is no file: then nothing is buffered
            return


class PlainViewer:
    """Scripts' lines to standard output, ours to standard error: `zml run x.py > out` has what x printed."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out = out
        self.err = err
        self.lines = Lines()

    def show(self, status: JobStatus) -> None:
        for line in self.lines.update(status):
            self.say(line)

    def script_line(self, line: str) -> None:
        pass_on(line, self.out)

    def say(self, line: str) -> None:
        print(f"zml: {line}", file=self.err, flush=True)

    def close(self) -> None:
        self.err.flush()


class LiveViewer:
    """One block at the bottom of the terminal; what scripts print scrolls above it."""

    def __init__(self, console: Console, out: TextIO | None) -> None:
        """`out` is where scripts' lines go if not to this terminal."""
        self.console = console
        self.out = out
        self.unicode = console.encoding.startswith("utf")
        self.live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self.live.start()

    def show(self, status: JobStatus) -> None:
        self.live.update(block(status, self.console.width - 1, unicode=self.unicode), refresh=True)

    def script_line(self, line: str) -> None:
        if self.out is not None:
            pass_on(line, self.out)
        else:
            self.console.print(Text.from_ansi(line), soft_wrap=True)

    def say(self, line: str) -> None:
        self.console.print(Text(printable(line), style="yellow"), soft_wrap=True)

    def close(self) -> None:
        self.live.update(Text(""), refresh=True)
        self.live.stop()


def viewer(out: TextIO, err: TextIO) -> Viewer:
    """The live block if standard error is a terminal that can move its cursor, else lines."""
    console = Console(file=err, highlight=False, markup=False, emoji=False)
    if not console.is_terminal or console.is_dumb_terminal or not err.isatty():
        return PlainViewer(out, err)
    return LiveViewer(console, None if out.isatty() else out)
