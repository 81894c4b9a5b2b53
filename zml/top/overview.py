"""The first page: how far the job is, how it goes, where the time goes, and what a person should look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.text import Text

from ..figures import PHASES
from ..status import JobStatus
from ..text import bars, console
from ..text.ansi import printable
from ..text.console import HERE, cropped, duration, number
from .known import Known
from .members import lasting, per_second
from .paces import WorkerPace
from .trouble import sentences

LABEL = 12
CURVES = 3  # of what the script logs
WORRIES = 8
MOST_EVENTS = 50


def lines(known: Known, width: int, *, unicode: bool) -> Iterator[Text]:
    """All of it, the most important first: what does not fit is scrolled to."""
    status = known.status
    if status is None:
        return
    paces, _ = known.paces()
    yield from head(status, width, unicode=unicode)
    for text, style in sentences(status, paces)[:WORRIES]:
        yield cropped(f"! {text}", width, style)
    yield from curves(known, width, unicode=unicode)
    yield from whereabouts(paces, status, width)
    yield from counts(status, width)
    if status.waiting_for:
        yield cropped(console.waiting(status.waiting_for), width, "yellow")
    if status.events:
        yield Text()
    for event in reversed(status.events[-MOST_EVENTS:]):
        yield cropped(console.event_text(event), width, "dim")


def head(status: JobStatus, width: int, *, unicode: bool) -> Iterator[Text]:
    """How far it is, and its numbers."""
    progress = status.progress
    if progress is not None:
        left = label(f"epoch {min(status.epoch + 1, status.epochs)}/{status.epochs}")
        eta = f"  eta {duration(status.eta_s)}" if status.eta_s is not None and not status.over else ""
        said = f" {100 * progress:3.0f} %{eta}"
        room = width - left.cell_len - len(said)
        yield Text.assemble(left, console.bar(progress, room, unicode=unicode), said)
    parts = console.figures(status)
    if parts:
        yield cropped("   ".join(parts), width, "bold")
    if status.state == "FORMING":
        yield cropped(console.here(status), width)
    if status.because and status.state != "RUNNING":
        yield cropped(status.because, width, console.STATE_STYLES.get(status.state, ""))
    if status.rate is not None and (told := console.rate(status.rate)):
        yield cropped(told, width)


def curves(known: Known, width: int, *, unicode: bool) -> Iterator[Text]:
    """The course of the script's first values and of the throughput, from the beginning of the run."""
    status = known.status
    assert status is not None
    courses: list[tuple[str, list[float | None], Callable[[float | None], str]]]
    courses = [(name, known.values(name), number) for name in list(status.values)[:CURVES]]
    courses.append(("samples/s", known.rates(), per_second))
    for name, values, word in courses:
        finite = [value for value in values if value is not None]
        if len(finite) < 2:
            continue
        ends = f"  {word(finite[0])} to {word(finite[-1])}"
        drawn = bars.spark(values, max(8, width - LABEL - len(ends)), unicode=unicode)
        yield Text.assemble(label(printable(name)), (drawn, "cyan"), (ends, "dim"))


def whereabouts(paces: dict[str, WorkerPace], status: JobStatus, width: int) -> Iterator[Text]:
    """The mean step of the workers that are here."""
    here = [paces[m.member] for m in status.of("worker") if m.state in HERE and m.member in paces]
    timed = [pace for pace in here if pace.step_s]
    if not timed:
        return
    whole = sum(pace.step_s or 0.0 for pace in timed) / len(timed)
    spent = {name: sum(pace.phases.get(name, 0.0) for pace in timed) / len(timed) for name in PHASES}
    known = [name for name in PHASES if any(name in pace.phases for pace in timed)]
    if known:
        yield Text.assemble(label("a step"), bars.phases(spent, whole, width - LABEL))
        said = "  ".join(f"{name} {spent[name] / whole:.0%}" for name in known)
        yield cropped(f"{'':<{LABEL}}{lasting(whole)}: {said}", width)
    else:
        yield Text.assemble(label("a step"), lasting(whole))


def counts(status: JobStatus, width: int) -> Iterator[Text]:
    for role, asked in (("worker", status.workers), ("shard", status.shards)):
        there = sum(member.state in HERE for member in status.of(role))
        others: dict[str, int] = {}
        for member in status.of(role):
            if member.state not in HERE:
                others[member.state] = others.get(member.state, 0) + 1
        here = [] if status.over else [f"{there} of {asked} here"]
        said = ", ".join([*here, *(f"{count} {state}" for state, count in others.items())])
        if said:
            yield cropped(f"{role + 's':<{LABEL}}{said}", width)
    for key, said in (
        ("data", console.data(status.data, over=status.over)),
        ("checkpoint", console.checkpoint(status)),
        ("ended", console.ended(status)),
    ):
        if said:
            yield cropped(f"{key:<{LABEL}}{said}", width)


def label(text: str) -> Text:
    drawn = Text(text)
    drawn.truncate(LABEL - 1, overflow="ellipsis")
    drawn.pad_right(LABEL - drawn.cell_len)
    return drawn


def events(status: JobStatus, needle: str, width: int) -> list[Text]:
    """The latest, newest first, and what a script that failed said."""
    drawn = []
    for failure in status.failures:
        what = failure.failure
        drawn.append((f"{failure.member} raised {what.kind}: {what.text}" if what.kind else what.text, "red"))
    drawn += [(console.event_text(event), "") for event in reversed(status.events)]
    return [cropped(text, width, style) for text, style in drawn if needle.lower() in text.lower()]
