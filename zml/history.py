"""How a run went, as rows in two files of its directory: of the whole job, and of each member.

Rule: a file holds a bounded number of rows however long the run is. When there are twice as many, every other one is
dropped, and from then on half as many are written: what is left is spread evenly over the run. Figures are cumulative,
so that a rate between two rows is exact whatever was dropped between them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from .figures import ShardFigures, WorkerFigures
from .status import JobStatus

JOB = "history.jsonl"
MEMBERS = "members.jsonl"
JOB_ROWS = 2000
MEMBER_ROWS = 300
LONGEST_ROW = 4 * 2**20  # bytes; what is longer was not written by us


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The job at one moment. `at` is seconds since the Unix epoch."""

    at: float
    state: str = ""
    steps: int = 0
    epoch: int = 0
    progress: float | None = None
    samples: int = 0
    samples_per_s: float = 0.0
    staleness: int = 0
    values: dict[str, float | None] = {}  # None: not finite
    learning_rate: float | None = None
    workers: int = 0  # that are here
    shards: int = 0


class MemberRow(msgspec.Struct, frozen=True, kw_only=True):
    """Every member at one moment."""

    at: float
    workers: dict[str, WorkerFigures] = {}
    shards: dict[str, ShardFigures] = {}


AnyRow = TypeVar("AnyRow", Row, MemberRow)


class Rows(Generic[AnyRow]):
    """Appends to one file, and thins it out. Raises OSError; what is in the file stays readable."""

    def __init__(self, path: Path, kind: type[AnyRow], most: int) -> None:
        """Goes on with a file that is there."""
        self.path = path
        self.kind: type[AnyRow] = kind
        self.most = most
        self.kept = sum(1 for _ in read(path, kind))
        self.every = 1  # of how many rows one is kept
        self.came = 0

    def add(self, row: AnyRow) -> None:
        self.came += 1
        if (self.came - 1) % self.every:
            return
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")
        self.kept += 1
        if self.kept >= 2 * self.most:
            self._thin()

    def _thin(self) -> None:
        rows = list(read(self.path, self.kind))[::2]
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
        os.replace(scratch, self.path)
        self.kept, self.every, self.came = len(rows), self.every * 2, 0


def read(path: Path, kind: type[AnyRow]) -> Iterator[AnyRow]:
    """The rows of a file, oldest first; none where there is no file. Torn and foreign lines are passed over."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            with suppress(msgspec.MsgspecError):
                yield msgspec.json.decode(line, type=kind)


def job_row(status: JobStatus) -> Row:
    """The job's numbers out of its status."""
    workers = [m for m in status.of("worker") if m.state in ("active", "joined")]
    rates = [m.figures.learning_rate for m in workers if m.figures is not None]
    return Row(
        at=status.at,
        state=status.state,
        steps=status.steps,
        epoch=status.epoch,
        progress=status.progress,
        samples=status.samples,
        samples_per_s=status.samples_per_s,
        staleness=status.staleness,
        values=dict(status.values),
        learning_rate=next((rate for rate in rates if rate is not None), None),
        workers=len(workers),
        shards=len([m for m in status.of("shard") if m.state in ("active", "joined")]),
    )


def member_row(status: JobStatus) -> MemberRow:
    """Its members' figures."""
    return MemberRow(
        at=status.at,
        workers={m.member: m.figures for m in status.members if m.figures is not None},
        shards={m.member: m.shard for m in status.members if m.shard is not None},
    )
