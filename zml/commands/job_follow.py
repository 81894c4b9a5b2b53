"""Staying with a job from afar: until it is over, or while it prints.

The server may be away for a while, as it is when it is started again: whoever follows waits for it as long as a
training would. Ctrl-C ends the looking and never the job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import click

from ..cluster.client import Client, Gone
from ..cluster.jobs import JobView
from ..errors import INTERRUPTED, NO_JOB, UNREACHABLE, USAGE, ZmlError
from ..text.job_views import clock, event
from ..web.bodies import ENDS

AWAY_S = 600.0  # that a server may be away, as `coordinator_away_s` has it
AGAIN_S = 2.0
LOOK_S = 1.0  # between two looks whether an output is there by now


def patiently(
    what: Callable[[], Iterator[JobView | None]], *, reached: bool = False
) -> Iterator[JobView | None]:
    """The changes of a job, over the server's restarts. Raises ZmlError when it stays away, or never was there.
    `reached`: it was there before."""
    away_since: float | None = None
    while True:
        try:
            for job in what():
                away_since, reached = None, True
                yield job
        except ZmlError as error:
            if error.code != UNREACHABLE or not reached:
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
    for view in patiently(lambda: client.changes(job, LOOK_S)) if follow else iter([client.job(job)]):
        files = [each.name for each in client.logs(job, attempt).files]
        over = view is not None and view.state in ENDS
        # What zml itself says is there before a script has printed anything; where none ever did, it says why.
        if any(name.endswith(".out") for name in files) or (files and over):
            return first(files)
        if over:
            break
        if follow and not said and view is not None:
            click.echo(f"zml: {event(view)}; it has printed nothing yet", err=True)
            said = True
    raise ZmlError(USAGE, f"{job} has printed nothing yet", f"`zml explain {job}` says what became of it.")


def show(client: Client, job: str, name: str, *, attempt: int, tail: int | None, follow: bool) -> int:
    """Print an output, byte for byte; where it is followed, over all attempts that come, until the job is over."""
    name = name or name_of(client, job, attempt, follow=follow)
    if not follow:
        try:
            for piece in client.log(job, name, attempt=attempt, tail=tail).pieces:
                write(piece)
        except Gone as gone:
            raise ZmlError(UNREACHABLE, f"the connection broke: {gone}", "Ask again.") from None
        return 0
    number, at = attempt, 0  # whose output it is, and the byte to go on from
    begun = drained = False
    while True:
        try:
            whole = begun or tail is None
            log = client.log(
                job,
                name,
                attempt=number,
                follow=True,
                tail=None if whole else tail,
                offset=at if whole else None,
            )
            number, at, begun = log.attempt, log.offset, True
            for piece in log.pieces:
                at += len(piece)
                write(piece)
        except Gone:
            pass  # it is asked again, from there
        except ZmlError as error:
            nothing_yet = error.code == NO_JOB and (begun or not client.logs(job, attempt).files)
            if not nothing_yet and not (begun and error.code == UNREACHABLE):
                raise
        following = next_attempt(client, job, number, pinned=bool(attempt))
        if following == number:
            drained = False
        elif number and not drained:
            drained = True  # it was over before it was read, perhaps: once more
        elif following is None:
            return 0
        else:
            if number:
                click.echo(f"zml: {job} attempt {following}", err=True)
            number, at, drained = following, 0, False


def write(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def next_attempt(client: Client, job: str, number: int, *, pinned: bool) -> int | None:
    """Which attempt to go on with when the output of this one has ended, broke off or has not begun; None: there is
    nothing more to come."""
    seen: JobView | None = None
    for view in patiently(lambda: client.changes(job, LOOK_S), reached=True):
        looked_before = seen is not None
        seen = view or seen
        assert seen is not None
        latest = seen.attempts[-1] if seen.attempts else None
        if latest is not None and latest.number > number and not pinned:
            return latest.number
        mine = next((each for each in seen.attempts if each.number == number), None)
        over = mine is not None and mine.ended_at is not None
        if seen.state in ENDS or (pinned and over):
            return None
        if mine is not None and not over and looked_before:  # it goes on: asked again, but not at once
            return number
    raise AssertionError
