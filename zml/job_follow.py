"""Staying with a job from afar: until it is over, or while it prints.

The server may be away for a while, as it is when it is started again: whoever follows waits for it as long as a
training would. Ctrl-C ends the looking and never the job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import click

from .cluster.client import Client, Gone
from .cluster.jobs import JobView
from .errors import INTERRUPTED, UNREACHABLE, USAGE, ZmlError
from .job_views import clock, event
from .web.bodies import ENDS

AWAY_S = 600.0  # that a server may be away, as `coordinator_away_s` has it
AGAIN_S = 2.0


def patiently(what: Callable[[], Iterator[JobView | None]]) -> Iterator[JobView | None]:
    """The changes of a job, over the server's restarts. Raises ZmlError when it stays away."""
    away_since: float | None = None
    while True:
        try:
            for job in what():
                away_since = None
                yield job
        except ZmlError as error:
            if error.code != UNREACHABLE:
                raise
            if away_since is None:
                away_since = time.monotonic()
                click.echo(f"zml: {error.what}; waiting for it", err=True)
            if time.monotonic() - away_since > AWAY_S:
                raise
            time.sleep(AGAIN_S)


def until(client: Client, job: str, done: Callable[[JobView], bool], *, quiet_first: bool) -> JobView:
    """Print each change of a job until one of them is what is waited for. `quiet_first`: how it is now was said."""
    shown = None
    for view in patiently(lambda: client.changes(job)):
        if view is None:
            continue
        now = (view.state, view.workers, view.because if view.state in ENDS else "")
        if now != shown and not (shown is None and quiet_first):
            click.echo(f"{clock(time.time())} {event(view)}", err=True)
        shown = now
        if done(view):
            return view
    raise AssertionError


def is_over(job: JobView) -> bool:
    return job.state in ENDS


def wait(client: Client, job: str, *, quiet_first: bool = False) -> JobView | None:
    """Stay until a job is over; None where Ctrl-C came first."""
    try:
        return until(client, job, is_over, quiet_first=quiet_first)
    except KeyboardInterrupt:
        click.echo(
            f"\ndetached; {job} goes on\n"
            f"  `zml job show --wait {job}` looks again, `zml job cancel {job}` ends it.",
            err=True,
        )
        return None


def exit_code(job: JobView | None) -> int:
    """What a command ends with that waited for a job: the job's own, or 1 where it ended badly without one."""
    if job is None:
        return INTERRUPTED
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.state == "SUCCEEDED" else 1


# -- output --------------------------------------------------------------------------------------------------


def first(files: list[str]) -> str:
    """Whose output is meant where nobody is named: the first worker's, as `zml run` shows it."""

    def rank(name: str) -> tuple[bool, bool, int, str]:
        return (not name.endswith(".out"), not name.startswith("w"), len(name), name)

    return min(files, key=rank)


def name_of(client: Client, job: str, attempt: int, *, follow: bool) -> str:
    """The output to show where none was named; where it is followed, it may come later."""
    said = False
    for view in patiently(lambda: client.changes(job, 2.0)) if follow else iter([None]):
        files = [each.name for each in client.logs(job, attempt).files]
        if files:
            return first(files)
        if view is not None and view.state in ENDS:
            break
        if not said and view is not None:
            click.echo(f"zml: {event(view)}; it has printed nothing yet", err=True)
            said = True
    raise ZmlError(USAGE, f"{job} has printed nothing yet", f"`zml explain {job}` says what became of it.")


def show(client: Client, job: str, name: str, *, attempt: int, tail: int | None, follow: bool) -> int:
    """Print an output, byte for byte; where it is followed, over all attempts that come, until the job is over."""
    name = name or name_of(client, job, attempt, follow=follow)
    at: int | None = None  # the byte to go on from
    number = attempt
    while True:
        log = client.log(
            job, name, attempt=number, follow=follow, tail=tail if at is None else None, offset=at
        )
        number, at = log.attempt, log.offset
        try:
            for piece in log.pieces:
                at += len(piece)
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        except Gone as gone:
            if not follow:
                raise ZmlError(UNREACHABLE, f"the connection broke: {gone}", "Ask again.") from None
        if not follow:
            return 0
        following = next_attempt(client, job, number, pinned=bool(attempt))
        if following is None:
            return 0
        if following != number:
            click.echo(f"zml: {job} attempt {following}", err=True)
            number, at, tail = following, 0, None


def next_attempt(client: Client, job: str, number: int, *, pinned: bool) -> int | None:
    """Which attempt to go on with when the output of this one has ended or broke off; None: there is no more."""
    for view in patiently(lambda: client.changes(job)):
        if view is None:
            continue
        mine = next((each for each in view.attempts if each.number == number), None)
        if mine is not None and mine.ended_at is None and view.state not in ENDS:
            return number
        if pinned:
            return None
        if view.attempts and view.attempts[-1].number > number:
            return view.attempts[-1].number
        if view.state in ENDS:
            return None
    raise AssertionError
