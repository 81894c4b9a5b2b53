"""Where the time of a step goes: compute, encode, wait and apply of the training thread, and beside it, in the I/O
thread, send and pull.

The first four add up to the step; with overlap, send and pull run beside the next step and show as wait only where
they are longer than it. Steps go to a file of JSON lines in the run directory; `zml timeline` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

KEPT = 20_000  # steps in a file; of a longer run each further power of two of them is thinned out
THREAD = ("compute", "encode", "wait", "apply")  # what the training thread does, in this order


@dataclass(slots=True)
class Phases:
    """What the I/O thread measures of one exchange."""

    send_s: float = 0.0  # from the end of the step until every shard has counted it
    pull_s: float = 0.0  # from then on until the last parameters are here


class Step(msgspec.Struct, frozen=True):
    """One line of the file. Seconds and bytes; `at` is seconds since the worker's first step, and `began` the same
    moment since the Unix epoch, by the clock of the worker's machine; 0 in files that do not have it."""

    clock: int
    at: float
    compute: float
    encode: float
    wait: float
    apply: float
    send: float
    pull: float
    bytes_up: int
    bytes_down: int
    began: float = 0.0

    @property
    def whole(self) -> float:
        return sum(self.thread().values())

    def thread(self) -> dict[str, float]:
        """Seconds of the training thread, by phase."""
        return {phase: getattr(self, phase) for phase in THREAD}


class Timeline:
    """Measures one worker's steps. Belongs to the training thread; only a `Phases` is written by another."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.began: float | None = None  # the end of the step before; None before the first
        self.first = 0.0
        self.spent = dict.fromkeys(THREAD, 0.0)
        self.up = self.down = 0
        self.exchange = Phases()
        self.lines: list[tuple[Step, Phases]] = []  # measured, not yet written
        self.steps = 0
        self.every = 1

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] += time.perf_counter() - began

    def sent(self, size: int) -> None:
        self.up += size

    def came(self, size: int) -> None:
        self.down += size

    def open(self) -> Phases:
        """For the exchange that this step begins."""
        self.exchange = Phases()
        return self.exchange

    def close(self, clock: int) -> float | None:
        """The step is over; returns the seconds that it computed, None for the first one: nobody knows when its
        computing began."""
        now, computed = time.perf_counter(), None
        if self.began is None:
            self.first = now
        else:
            computed = now - self.began - sum(self.spent.values())
            self._keep(clock, self.began - self.first, computed)
        self.began = now
        self.spent = dict.fromkeys(THREAD, 0.0)
        self.up = self.down = 0
        return computed

    def _keep(self, clock: int, at: float, computed: float) -> None:
        self.steps += 1
        if self.steps >= KEPT * self.every:
            self.every *= 2
        if self.path is None or self.steps % self.every:
            return
        spent = {**self.spent, "compute": computed}
        step = Step(
            clock,
            at,
            **spent,
            send=0,
            pull=0,
            bytes_up=self.up,
            bytes_down=self.down,
            began=time.time() - sum(spent.values()),
        )
        self.lines.append((step, self.exchange))

    def pause(self) -> None:
        """What comes now (an evaluation, an epoch's end) belongs to no step."""
        self.began = time.perf_counter() if self.began is not None else None
        self.spent = dict.fromkeys(THREAD, 0.0)
        self.up = self.down = 0

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


def read(path: Path) -> list[Step]:
    """The steps of a file; a torn last line is passed over."""
    steps = []
    for line in path.read_bytes().splitlines():
        try:
            steps.append(msgspec.json.decode(line, type=Step))
        except msgspec.MsgspecError:
            continue
    return steps
