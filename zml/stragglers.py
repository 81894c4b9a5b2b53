"""Who is slow, who starves, who is not heard: judged alike wherever it is shown. Pure.

Rule: a straggler is who takes long itself. In lockstep every worker's step lasts as long as the slowest one's, and the
one that is waited for is the one that does not wait: workers are compared by what they do but wait.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from .figures import PHASES

SLOW, BAD = 1.5, 2.0  # times the median of the others; the alert is for the second
NOTICED_S = 0.005  # by which a step must be longer, or nobody would notice
MOST = 99.0  # times: beyond, the number says no more
STARVING, STARVED = 0.2, 0.5  # share of a step that waits for the loader; the alert is for the second
UNHEARD_S = 5.0  # of a member that counts as alive, as it may where leases are long,
UNHEARD_BEATS = 3  # and so many of its heartbeats
BUSY = tuple(phase for phase in PHASES if phase != "wait")  # what a worker does itself

Phases = Mapping[str, float]
"""Seconds of a step by the names of `figures.PHASES`; what is missing took none."""


def unheard(heard_s: float, every_s: float) -> bool:
    """Has a member that counts as alive, and speaks so often, been silent for longer than people should be told?"""
    return heard_s >= max(UNHEARD_S, UNHEARD_BEATS * every_s)


def seldom(every_s: float) -> float:
    """How often a member speaks, if `unheard` must know: 0 where five seconds are many of its heartbeats."""
    return every_s if UNHEARD_BEATS * every_s > UNHEARD_S else 0.0


@dataclass(frozen=True, slots=True)
class Slow:
    """A straggler: its work for a step against the median of the others, and the phase that makes most of the
    difference. `ratio` ends at 99, which is what it is where the others do nothing."""

    ratio: float
    phase: str

    @property
    def level(self) -> Literal["bad", "warn"]:
        return "bad" if self.ratio >= BAD else "warn"


def busy_s(phases: Phases) -> float:
    return sum(phases.get(phase, 0.0) for phase in BUSY)


def ratio(busy_s: float, usual: float) -> float:
    """How many times the usual of the others; at most `MOST`, and that where they do nothing."""
    return min(busy_s / usual, MOST) if usual > 0 else MOST


def data_share(phases: Phases) -> float:
    """Of a step, what goes into the loader."""
    whole = sum(phases.get(phase, 0.0) for phase in PHASES)
    return phases.get("data", 0.0) / whole if whole > 0 else 0.0


def starving(workers: Mapping[str, Phases], slow: Mapping[str, Slow]) -> dict[str, float]:
    """By worker the share of its steps that waits for the loader, where that is much and not said already: of a
    straggler by its data it is."""
    shares = {name: data_share(phases) for name, phases in workers.items()}
    return {
        name: share
        for name, share in shares.items()
        if share >= STARVING and (name not in slow or slow[name].phase != "data")
    }


def usual_of_others(busy: Mapping[str, float]) -> dict[str, float]:
    """The median of the work that a step is for all others, for each: what it is measured against. None where there
    are no others. It takes n log n for n workers."""
    ordered, others = sorted(busy.values()), len(busy) - 1
    if others < 1:
        return {}

    def without(own: int, place: int) -> float:
        return ordered[place if place < own else place + 1]

    owns = {name: bisect_left(ordered, each) for name, each in busy.items()}
    return {
        name: (without(own, (others - 1) // 2) + without(own, others // 2)) / 2 for name, own in owns.items()
    }


def stragglers(workers: Mapping[str, Phases]) -> dict[str, Slow]:
    """By worker; the mean phases of its latest steps in."""
    busy = {name: busy_s(phases) for name, phases in workers.items()}
    found = {}
    for worker, usual in usual_of_others(busy).items():
        if busy[worker] - usual < NOTICED_S or busy[worker] < SLOW * usual:
            continue
        others = [phases for name, phases in workers.items() if name != worker]
        excess = {
            phase: workers[worker].get(phase, 0.0) - median(other.get(phase, 0.0) for other in others)
            for phase in BUSY
        }
        found[worker] = Slow(ratio(busy[worker], usual), max(BUSY, key=excess.__getitem__))
    return found
