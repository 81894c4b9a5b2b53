"""Writes down how a job goes, while it does: the two files of its history, and its newest status for other machines.

Rule: nothing is decided by what is written here. A full disk costs rows, never the run; and where nothing was reported
since the last time, nothing is written, so that a thousand quiet jobs cost nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import structlog

from . import history, rundir
from .history import MemberRow, Row, Rows
from .status import JobStatus

EVERY_S = 2.0

log = structlog.get_logger()
Follower = Callable[[JobStatus], None]  # is told each status that is written down; must not wait


class Recorder:
    """One job's, from `start` to `stop`. `status` is its status now; `changes` grows with what is reported."""

    def __init__(
        self,
        folder: Path,
        status: Callable[[], JobStatus],
        changes: Callable[[], int],
        followers: Sequence[Follower] = (),
        every_s: float = EVERY_S,
    ) -> None:
        self.folder = folder
        self.status = status
        self.changes = changes
        self.followers = list(followers)
        self.every_s = every_s
        self.job = Rows(folder / history.JOB, Row, history.JOB_ROWS)
        self.members = Rows(folder / history.MEMBERS, MemberRow, history.MEMBER_ROWS)
        self.seen = -1
        self.full = False  # the disk was, the last time
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """With a last row that says how it stands now. May be called twice, and without a start."""
        if self.task is None:
            return
        task, self.task = self.task, None
        task.cancel()
        await asyncio.wait({task})
        self.look()

    async def _run(self) -> None:
        await asyncio.sleep(
            self.every_s * random.random()
        )  # not all of a coordinator's jobs in the same moment
        while True:
            self.look()
            await asyncio.sleep(self.every_s)

    def look(self) -> None:
        """Write down what is new, if anything is."""
        changes = self.changes()
        if changes == self.seen:
            return
        self.seen = changes
        status = self.status()
        for follower in self.followers:
            follower(status)
        try:
            rundir.write(self.folder / rundir.NOW, msgspec.json.encode(status))
            if status.steps > 0:
                self.job.add(history.job_row(status))
                self.members.add(history.member_row(status))
            self.full = False
        except OSError as error:
            if not self.full:
                log.warning("the run's history is not written", folder=str(self.folder), because=str(error))
            self.full = True
