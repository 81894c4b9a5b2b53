"""What is known of the job that is watched: its newest status, how it went so far, and how fast everybody is now.

It is told what was seen, and asks nobody. Bounded: of a long run every other row of the past is dropped when there are
too many, as in the run's own history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..cluster.jobs import JobView, NodeView
from ..runs.history import MemberRow, Row, job_row
from ..status import JobStatus, since_the_first
from .paces import ShardPace, Trails, WorkerPace

ROWS = 2000  # of the past


@dataclass(frozen=True, slots=True)
class Past:
    """What a run's directory tells of the time before one began to watch."""

    rows: Sequence[Row] = ()
    members: Sequence[MemberRow] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """One look. `place` says where it was taken from; `trouble`, if anything, why not from where it should be."""

    status: JobStatus | None = None
    jobs: Sequence[JobView] | None = None  # None: this is no cluster
    nodes: Sequence[NodeView] = ()
    place: str = ""
    trouble: str = ""
    past: Past | None = None  # with the first look at a run
    inside: str = ""  # the job that was entered, of a cluster
    at: float = 0.0  # when, in seconds since the Unix epoch


@dataclass
class Known:
    """Grows with `take`. Of a cluster, only the newest look counts."""

    seen: Seen = field(default_factory=Seen)
    status: JobStatus | None = None  # with steps as people count them
    said: JobStatus | None = None  # the same as it came
    trails: Trails = field(default_factory=Trails)
    kept: list[Row] = field(default_factory=list)
    newest: Row | None = None
    every: int = 1  # of how many rows one is kept
    came: int = 0

    def take(self, seen: Seen) -> None:
        """A look that could not be taken leaves what was known before."""
        self.seen = seen
        status = seen.status
        if status is None:
            return
        if self.status is not None and (self.status.job, self.status.run_dir) != (status.job, status.run_dir):
            self.trails, self.kept, self.newest, self.every, self.came = Trails(), [], None, 1, 0
        if seen.past is not None and self.newest is None:
            self._recall(seen.past, status)
        if self.status is not None and status.at < self.status.at:
            return  # a file that is older than what the coordinator said
        if self.status is None or status.at > self.status.at:
            self._row(job_row(status))
        self.status, self.said = since_the_first(status), status
        self.trails.see(status)

    def _recall(self, past: Past, status: JobStatus) -> None:
        for row in past.rows:
            self._row(row)
        for members in past.members:
            if members.at < status.at:
                self.trails.recall(members, status)

    def _row(self, row: Row) -> None:
        """Nothing is kept of the time before the first step."""
        if row.steps <= 0 or (self.newest is not None and row.at <= self.newest.at):
            return
        self.newest = row
        self.came += 1
        if self.came % self.every == 0:
            self.kept.append(row)
        if len(self.kept) > ROWS:
            self.kept, self.every, self.came = self.kept[::2], self.every * 2, 0

    @property
    def rows(self) -> list[Row]:
        """How it went, the oldest first: at most ROWS that are spread evenly, and the newest."""
        if self.newest is None or (self.kept and self.kept[-1] is self.newest):
            return self.kept
        return [*self.kept, self.newest]

    def values(self, name: str) -> list[float | None]:
        """The course of what the script logs by this name."""
        return [row.values[name] for row in self.rows if name in row.values]

    def rates(self) -> list[float | None]:
        """Of samples per second."""
        return [row.samples_per_s for row in self.rows]

    def paces(self) -> tuple[dict[str, WorkerPace], dict[str, ShardPace]]:
        return self.trails.paces()

    def as_json(self) -> dict[str, object]:
        """For machines: the status as it is, and what was made of two of them."""
        told: dict[str, object] = {"place": self.seen.place, "trouble": self.seen.trouble}
        if self.seen.jobs is not None:
            return told | {
                "jobs": msgspec.to_builtins(list(self.seen.jobs)),
                "nodes": msgspec.to_builtins(list(self.seen.nodes)),
            }
        workers, shards = self.paces()
        return told | {
            "status": msgspec.to_builtins(self.said),
            "workers": msgspec.to_builtins(workers),
            "shards": msgspec.to_builtins(shards),
        }


def numbered(name: str) -> tuple[str, int, str]:
    """w2 before w10."""
    digits = "".join(c for c in name if c.isdigit())
    return name.rstrip("0123456789"), int(digits[:18] or 0), name
