"""How a run went, as rows in two files of its directory: of the whole job, and of each member.

Rule: a file holds a bounded number of rows however long the run is. When there are twice as many, every other one is
dropped, and from then on half as many are written: what is left is spread evenly over the run. Figures are cumulative,
so that a rate between two rows is exact whatever was dropped between them.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ..figures import ShardFigures, WorkerFigures
from ..status import JobStatus

JOB = "history.jsonl"
MEMBERS = "members.jsonl"
JOB_ROWS = 2000
MEMBER_ROWS = 300
MOST_BYTES = 32 * 2**20  # of a file, whatever its rows take
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
    """Appends to one file, and thins it out. Belongs to one thread at a time."""

    def __init__(self, path: Path, kind: type[AnyRow], most: int, every_s: float = 2.0) -> None:
        """Nothing is read or written yet. `every_s`: how often there is a row, before any is left out."""
        self.path = path
        self.kind: type[AnyRow] = kind
        self.most = most
        self.every_s = every_s
        self.kept = -1  # rows in the file; -1: nobody has looked
        self.bytes = 0
        self.apart_s = 0.0  # between two rows that are kept
        self.last_at = -math.inf

    def add(self, row: AnyRow) -> None:
        """Raises OSError; what is in the file stays readable, and nothing of this row is in it."""
        if self.kept < 0:
            self._go_on()
        if 0 <= row.at - self.last_at < self.apart_s - self.every_s / 2:  # a clock may be set back
            return
        line = msgspec.json.encode(row) + b"\n"
        with self.path.open("ab", buffering=0) as file:
            try:
                whole = file.write(line) == len(line)
            except OSError:
                whole = False
            if not whole:
                file.truncate(self.bytes)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.kept, self.bytes, self.last_at = self.kept + 1, self.bytes + len(line), row.at
        if self.kept >= 2 * self.most or (self.bytes >= MOST_BYTES and self.kept > 2):
            self._thin()

    def _go_on(self) -> None:
        """With a file that another process has begun, as thin as that one has left it."""
        with self.path.open("ab+") as file:
            file.seek(0)
            lines, first, last = 0, b"", b""
            for line in file:
                lines, first, last = lines + 1, first or line, line
            if last and not last.endswith(b"\n"):
                file.write(b"\n")  # that process died in the middle of it
            self.bytes = file.tell()
        times = [row.at for line in (first, last) if (row := _row(line, self.kind)) is not None]
        if lines > 1 and len(times) == 2 and times[1] > times[0]:
            times_as_far = (times[1] - times[0]) / (lines - 1) / self.every_s
            self.apart_s = 2 ** max(0, round(math.log2(times_as_far))) * self.every_s
            self.last_at = times[1]
        self.kept = lines

    def _thin(self) -> None:
        """Line by line, for the file of many workers is large."""
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with self.path.open("rb") as file, scratch.open("wb") as thinner:
                thinner.writelines(line for number, line in enumerate(file) if not number % 2)
                size = thinner.tell()
            os.replace(scratch, self.path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        self.kept, self.bytes = (self.kept + 1) // 2, size
        self.apart_s = 2 * max(self.apart_s, self.every_s)


def _row(line: bytes, kind: type[AnyRow]) -> AnyRow | None:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.MsgspecError:
        return None


def read(path: Path, kind: type[AnyRow]) -> Iterator[AnyRow]:
    """The rows of a file, oldest first; none where there is no file. Torn and foreign lines are passed over."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while line := file.readline(LONGEST_ROW):
            if (row := _row(line, kind)) is not None:
                yield row


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
