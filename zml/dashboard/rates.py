"""What members did between two moments, out of their cumulative figures: a member that began anew counts from then.

A `Trim` has only those figures that charts are made of. A long run has hundreds of rows of some sixty members; to read
all of each would take most of the time in which a page is to be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import msgspec

from ..figures import BESIDE, PHASES
from ..runs.history import member_row
from ..status import JobStatus
from ..stragglers import busy_s


class WorkerTrim(msgspec.Struct, frozen=True):
    steps: int = 0
    samples: int = 0
    left_out: int = 0
    phases: dict[str, float] = {}
    step_sum_s: float = 0.0


class ShardTrim(msgspec.Struct, frozen=True):
    updates: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    parked: int = 0
    staged: int = 0
    apply_sum_s: float = 0.0


class Trim(msgspec.Struct, frozen=True):
    """A row of members.jsonl."""

    at: float
    workers: dict[str, WorkerTrim] = {}
    shards: dict[str, ShardTrim] = {}


@dataclass(frozen=True, slots=True)
class WorkerRate:
    """Of one worker between two rows. Seconds are of a step."""

    steps: int
    step_s: float
    phases: Mapping[str, float]
    beside: Mapping[str, float]
    samples_per_s: float
    left_out: int

    @property
    def busy_s(self) -> float:
        return busy_s(self.phases)


@dataclass(frozen=True, slots=True)
class ShardRate:
    updates: int
    seconds: float
    apply_s: float | None  # of an update
    received_per_s: float
    sent_per_s: float
    queue: int

    @property
    def updates_per_s(self) -> float:
        return self.updates / self.seconds if self.seconds > 0 else 0.0


FURTHEST_BACK_S = 600.0  # that a step of a slow worker is looked for


def row_of(status: JobStatus) -> Trim:
    """As the run's history would have it, which is written more seldom the longer the run is."""
    return msgspec.convert(member_row(status), Trim, from_attributes=True)


NO_WORKER, NO_SHARD = WorkerTrim(), ShardTrim()


def worker_rate(before: WorkerTrim | None, now: WorkerTrim, seconds: float) -> WorkerRate | None:
    """None where it made no step."""
    if before is None or before.steps > now.steps:
        before = NO_WORKER
    steps = now.steps - before.steps
    if steps <= 0:
        return None

    def each(names: Sequence[str]) -> dict[str, float]:
        return {
            name: max(0.0, now.phases.get(name, 0.0) - before.phases.get(name, 0.0)) / steps for name in names
        }

    phases = each(PHASES)
    return WorkerRate(
        steps,
        sum(phases.values()) or max(0.0, now.step_sum_s - before.step_sum_s) / steps,
        phases,
        each(BESIDE),
        (now.samples - before.samples) / seconds if seconds > 0 else 0.0,
        max(0, now.left_out - before.left_out),
    )


def shard_rate(before: ShardTrim | None, now: ShardTrim, seconds: float) -> ShardRate:
    if before is None or before.updates > now.updates or before.received_bytes > now.received_bytes:
        before, seconds = NO_SHARD, 0.0
    updates = now.updates - before.updates

    def per_s(total: int) -> float:
        return max(0, total) / seconds if seconds > 0 else 0.0

    return ShardRate(
        updates,
        seconds,
        max(0.0, now.apply_sum_s - before.apply_sum_s) / updates if updates > 0 else None,
        per_s(now.received_bytes - before.received_bytes),
        per_s(now.sent_bytes - before.sent_bytes),
        now.parked + now.staged,
    )


@dataclass(frozen=True, slots=True)
class Still:
    """How long a worker has made no step, at the least; and how many it has made, and how long one takes it."""

    seconds: float
    steps: int
    step_s: float


@dataclass(frozen=True, slots=True)
class Lately:
    """What every member did in the newest rows, or in the whole run."""

    window_s: float
    whole: bool
    workers: Mapping[str, WorkerRate]
    shards: Mapping[str, ShardRate]
    still: Mapping[str, Still] = field(default_factory=dict)

    @property
    def phases(self) -> dict[str, Mapping[str, float]]:
        """By worker, seconds of a step."""
        return {name: rate.phases for name, rate in self.workers.items()}


NOTHING = Lately(0.0, False, {}, {})


def lately(rows: Sequence[Trim], window_s: float | None) -> Lately:
    """Between the newest row and the one so many seconds before it; None: all of them."""
    if not rows:
        return NOTHING
    newest, before = rows[-1], Trim(0.0)
    if window_s is None:
        before = Trim(
            rows[0].at
        )  # figures count from the start of a process: the whole run is the newest row
        seconds = newest.at - rows[0].at
    else:
        for row in reversed(rows[:-1]):
            before = row
            if newest.at - row.at >= window_s:
                break
        seconds = newest.at - before.at if before.at else 0.0
    workers = {}
    for name, figures in newest.workers.items():
        rate = worker_rate(before.workers.get(name), figures, seconds)
        if rate is None and window_s is not None:
            rate = further_back(rows, name)
        if rate is not None:
            workers[name] = rate
    shards = {
        name: shard_rate(
            before.shards.get(name) or (NO_SHARD if window_s is None else None), figures, seconds
        )
        for name, figures in newest.shards.items()
    }
    return Lately(seconds, window_s is None, workers, shards, still(rows))


def further_back(rows: Sequence[Trim], worker: str) -> WorkerRate | None:
    """Of one whose step is longer than the window."""
    newest = rows[-1]
    for row in reversed(rows[:-1]):
        if newest.at - row.at > FURTHEST_BACK_S:
            break
        rate = worker_rate(row.workers.get(worker), newest.workers[worker], newest.at - row.at)
        if rate is not None:
            return rate
    return None


def still(rows: Sequence[Trim]) -> dict[str, Still]:
    """Of every worker in the newest row."""
    newest = rows[-1]
    since = dict.fromkeys(newest.workers, newest.at)
    waiting = set(since)
    for row in reversed(rows[:-1]):
        for name in tuple(waiting):
            before = row.workers.get(name)
            if before is not None and before.steps == newest.workers[name].steps:
                since[name] = row.at
            else:
                waiting.discard(name)
        if not waiting:
            break
    return {
        name: Still(newest.at - since[name], each.steps, each.step_sum_s / each.steps if each.steps else 0.0)
        for name, each in newest.workers.items()
    }


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def shares(rates: Sequence[WorkerRate]) -> dict[str, float]:
    """Of the workers' time: where it went."""
    spent = {phase: sum(rate.phases[phase] * rate.steps for rate in rates) for phase in PHASES}
    whole = sum(spent.values())
    return {phase: seconds / whole for phase, seconds in spent.items()} if whole > 0 else {}
