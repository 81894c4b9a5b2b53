"""How fast each member is now: figures count from the start of a process, and a pace is what two of them differ by.

Rule: a pace is taken over the last `WINDOW_S` seconds in which something came. Where there is only one set of figures
it is the mean since the process began; where the process is another one by now, what was before is forgotten.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import msgspec

from ..figures import BESIDE, PHASES, ShardFigures, WorkerFigures
from ..runs.history import MemberRow
from ..status import JobStatus

WINDOW_S = 15.0
KEPT = 200  # sets of figures of one member, whatever the interval


class WorkerPace(msgspec.Struct, frozen=True, kw_only=True):
    """Of one worker. Seconds per step; None: no step was made in the window."""

    steps: int = 0  # that it was taken over
    step_s: float | None = None
    own_s: float | None = None  # of it, without waiting for others
    samples_per_s: float | None = None
    phases: dict[str, float] = {}  # seconds per step, by the names of figures.PHASES and BESIDE
    staleness: float | None = None  # mean
    sent_per_s: float = 0.0  # bytes
    received_per_s: float = 0.0
    quiet_s: float = 0.0  # since its figures changed last, as far as was seen


class ShardPace(msgspec.Struct, frozen=True, kw_only=True):
    """Of one shard."""

    updates_per_s: float | None = None
    apply_s: float | None = None  # mean
    received_per_s: float = 0.0  # bytes
    sent_per_s: float = 0.0
    saved_in: float | None = None  # share of the bytes that compression saved, of gradients; None: none came
    saved_out: float | None = None  # of parameters
    quiet_s: float = 0.0


AnyFigures = TypeVar("AnyFigures", WorkerFigures, ShardFigures)


class Trail(Generic[AnyFigures]):
    """The figures of one member over the window, oldest first, no two alike."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.seen: deque[tuple[float, AnyFigures]] = deque(maxlen=KEPT)

    def add(self, at: float, incarnation: int, figures: AnyFigures, begun_anew: bool) -> None:
        if begun_anew or incarnation != self.incarnation:
            self.seen.clear()
            self.incarnation = incarnation
        if self.seen and (self.seen[-1][1] == figures or at <= self.seen[-1][0]):
            return
        self.seen.append((at, figures))
        while len(self.seen) > 2 and self.seen[0][0] < at - WINDOW_S:
            self.seen.popleft()


class Trails:
    """Of all members."""

    def __init__(self) -> None:
        self.workers: dict[str, Trail[WorkerFigures]] = {}
        self.shards: dict[str, Trail[ShardFigures]] = {}
        self.at = 0.0

    def see(self, status: JobStatus) -> None:
        """What a status says; the same one again changes nothing."""
        self.at = max(self.at, status.at)
        for member in status.members:
            if member.figures is not None:
                self._worker(member.member, status.at, member.incarnation, member.figures)
            if member.shard is not None:
                self._shard(member.member, status.at, member.incarnation, member.shard)
        there = {member.member for member in status.members}
        for gone in (self.workers.keys() | self.shards.keys()) - there:
            self.workers.pop(gone, None)
            self.shards.pop(gone, None)

    def recall(self, row: MemberRow, status: JobStatus) -> None:
        """A row of the run's history from before `status`. Rows do not say whose life they are of: counts that have
        fallen since do."""
        lives = {member.member: member.incarnation for member in status.members}
        for name, worker in row.workers.items():
            if name in lives:
                self._worker(name, row.at, lives[name], worker)
        for name, shard in row.shards.items():
            if name in lives:
                self._shard(name, row.at, lives[name], shard)

    def _worker(self, name: str, at: float, life: int, figures: WorkerFigures) -> None:
        trail = self.workers.setdefault(name, Trail())
        trail.add(at, life, figures, bool(trail.seen) and figures.steps < trail.seen[-1][1].steps)

    def _shard(self, name: str, at: float, life: int, figures: ShardFigures) -> None:
        trail = self.shards.setdefault(name, Trail())
        trail.add(at, life, figures, bool(trail.seen) and figures.updates < trail.seen[-1][1].updates)

    def worker(self, name: str) -> WorkerPace | None:
        trail = self.workers.get(name)
        if trail is None or not trail.seen:
            return None
        (began, first), (ended, last) = span(trail.seen, WorkerFigures())
        if began is None:
            began = ended - sum(last.phases.get(phase, 0.0) for phase in PHASES)
        return worker_pace(first, last, ended - began, max(0.0, self.at - ended))

    def shard(self, name: str) -> ShardPace | None:
        trail = self.shards.get(name)
        if trail is None or not trail.seen:
            return None
        (began, first), (ended, last) = span(trail.seen, ShardFigures())
        return shard_pace(first, last, ended - began if began is not None else None, self.at - ended)

    def paces(self) -> tuple[dict[str, WorkerPace], dict[str, ShardPace]]:
        workers = {name: pace for name in self.workers if (pace := self.worker(name)) is not None}
        shards = {name: found for name in self.shards if (found := self.shard(name)) is not None}
        return workers, shards


def span(
    seen: deque[tuple[float, AnyFigures]], nothing: AnyFigures
) -> tuple[tuple[float | None, AnyFigures], tuple[float, AnyFigures]]:
    """The first and the last of a window; of one alone, from nothing on, and nobody knows when that was."""
    return (seen[0] if len(seen) > 1 else (None, nothing)), seen[-1]


def worker_pace(first: WorkerFigures, last: WorkerFigures, seconds: float, quiet_s: float) -> WorkerPace:
    steps = last.steps - first.steps
    if steps <= 0:
        return WorkerPace(quiet_s=quiet_s)
    spent = {
        name: max(0.0, last.phases.get(name, 0.0) - first.phases.get(name, 0.0)) / steps
        for name in (*PHASES, *BESIDE)
        if name in last.phases
    }
    whole = sum(spent.get(name, 0.0) for name in PHASES) or None
    timed = sum(last.step_s) - sum(first.step_s)
    if whole is None and timed > 0:
        whole = (last.step_sum_s - first.step_sum_s) / timed
    return WorkerPace(
        steps=steps,
        step_s=whole,
        own_s=whole - spent.get("wait", 0.0) if whole is not None and spent else None,
        samples_per_s=(last.samples - first.samples) / seconds if seconds > 0 else None,
        phases=spent,
        staleness=(last.staleness_sum - first.staleness_sum) / steps,
        sent_per_s=rate(first.sent_bytes, last.sent_bytes, seconds),
        received_per_s=rate(first.received_bytes, last.received_bytes, seconds),
        quiet_s=quiet_s,
    )


def shard_pace(first: ShardFigures, last: ShardFigures, seconds: float | None, quiet_s: float) -> ShardPace:
    updates = last.updates - first.updates
    lasting = seconds or 0.0
    return ShardPace(
        updates_per_s=updates / lasting if lasting > 0 else None,
        apply_s=(last.apply_sum_s - first.apply_sum_s) / updates if updates > 0 else None,
        received_per_s=rate(first.received_bytes, last.received_bytes, lasting),
        sent_per_s=rate(first.sent_bytes, last.sent_bytes, lasting),
        saved_in=saved(last.received_bytes, last.dense_received_bytes),
        saved_out=saved(last.sent_bytes, last.dense_sent_bytes),
        quiet_s=max(0.0, quiet_s),
    )


def rate(first: int, last: int, seconds: float) -> float:
    return max(0, last - first) / seconds if seconds > 0 else 0.0


def saved(sent: int, dense: int) -> float | None:
    """Share of the bytes that did not have to travel, since the process began."""
    return max(0.0, 1.0 - sent / dense) if dense > 0 else None
