"""Where the time of a step goes: data, compute, encode, wait and apply of the training thread, and beside it, in the
I/O thread, send and pull.

The training thread always does one of the five, and what it does nested in another (a wait inside of the loader) is
taken off that one: so they add up to its time exactly. With overlap, send and pull run beside the next step and show
as wait only where they are longer than it. Steps go to a file of JSON lines in the run directory; `zml timeline`
prints it. What a step costs for it is some calls of `perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ..figures import BESIDE, PHASES
from ..runs.timeline import Step
from ..tracing.steps import UNTRACED, Untraced

KEPT = 20_000  # steps in a file; of a longer run each further power of two of them is thinned out
T = TypeVar("T")


@dataclass(slots=True)
class Phases:
    """What the I/O thread measures of one exchange."""

    send_s: float = 0.0  # from the end of the step until every shard has counted it
    pull_s: float = 0.0  # from then on until the last parameters are here


class During:
    """A third of the time of what `contextlib` makes of a generator; there are some of them for each bucket."""

    __slots__ = ("former", "phase", "timeline")

    def __init__(self, timeline: Timeline, phase: str) -> None:
        self.timeline = timeline
        self.phase = phase

    def __enter__(self) -> None:
        self.former = self.timeline.turn(self.phase)

    def __exit__(self, *_: object) -> None:
        self.timeline.turn(self.former)


class Timeline:
    """Measures one worker's steps. Belongs to the training thread; only a `Phases` and `beside` are written by another.

    `spent`, `up` and `down` only ever grow, so that whoever wants to know of a while takes their difference.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.beside = dict.fromkeys(BESIDE, 0.0)  # the I/O thread's
        self.up = self.down = 0  # bytes
        self.dense_up = self.dense_down = 0  # the same, were nothing compressed
        self.doing = "compute"
        self.since = time.perf_counter()
        self.trace: Untraced = UNTRACED
        self.began: float | None = None  # the end of the step before; None before the first
        self.stepped_at: float | None = None  # the end of the script's own step before
        self.first = 0.0
        self.before_first = dict(self.spent)
        self.former = (dict(self.spent), 0, 0)  # spent, up and down at `began`
        self.exchange = Phases()
        self.lines: list[tuple[Step, Phases]] = []  # measured, not yet written
        self.steps = 0
        self.every = 1

    def turn(self, phase: str) -> str:
        """From now on the training thread does this; returns what it did. In no other thread at the same time."""
        now, former = time.perf_counter(), self.doing
        self.spent[former] += now - self.since
        if former != "compute":  # that is what is left between the others
            self.trace.phase(former, self.since, now)
        self.doing, self.since = phase, now
        return former

    def measure(self, phase: str) -> During:
        """With this, the training thread does that."""
        return During(self, phase)

    def reading(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; the time inside of them is `data`."""
        while True:
            former = self.turn("data")
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.turn(former)
            yield item

    def sent(self, size: int, dense: int) -> None:
        self.up += size
        self.dense_up += dense

    def came(self, size: int, dense: int) -> None:
        self.down += size
        self.dense_down += dense

    def open(self) -> Phases:
        """For the exchange that this step begins."""
        self.exchange = Phases()
        return self.exchange

    def ended(self, exchange: Phases) -> None:
        """In the I/O thread."""
        self.beside["push"] += exchange.send_s
        self.beside["pull"] += exchange.pull_s

    def close(self, clock: int) -> float | None:
        """The step is over; returns the seconds that went to its data and computing, None for the first one: nobody
        knows when that began."""
        self.turn(self.doing)
        own = None
        if self.began is None:
            self.first, self.before_first = self.since, dict(self.spent)
        else:
            former, up, down = self.former
            spent = {phase: self.spent[phase] - former[phase] for phase in PHASES}
            own = spent["data"] + spent["compute"]
            self._keep(clock, self.began - self.first, spent, self.up - up, self.down - down)
        self.trace.close(clock, self.up - self.former[1], self.down - self.former[2])
        self._begin()
        return own

    def _begin(self) -> None:
        self.began = self.since
        self.former = (dict(self.spent), self.up, self.down)

    def _keep(self, clock: int, at: float, spent: dict[str, float], up: int, down: int) -> None:
        self.steps += 1
        if self.steps >= KEPT * self.every:
            self.every *= 2
        if self.path is None or self.steps % self.every:
            return
        began = time.time() - sum(spent.values())
        step = Step(clock, at, **spent, send=0, pull=0, bytes_up=up, bytes_down=down, began=began)
        self.lines.append((step, self.exchange))

    def pause(self) -> None:
        """What came since the last step (an evaluation, an epoch's end) belongs to no step."""
        self.turn(self.doing)
        self.trace.pause()
        if self.stepped_at is not None:
            self.stepped_at = self.since
        if self.began is not None:
            self._begin()

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each since the first step was over, as they were when this thread last turned to another."""
        if self.began is None:
            return {}
        spent = {phase: self.spent[phase] - self.before_first[phase] for phase in PHASES}
        return {**spent, **self.beside}

    def write(self) -> None:
        """Append to the file what is complete; the last step's exchange may still be under way."""
        complete, self.lines = self.lines[:-1], self.lines[-1:]
        if self.path is None or not complete:
            return
        steps = [msgspec.structs.replace(step, send=p.send_s, pull=p.pull_s) for step, p in complete]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(step) + b"\n" for step in steps))
        except OSError:
            self.path = None  # a full disk costs the picture of the run, never the run
