"""Writes down how a job goes, while it does: the two files of its history, and its newest status for other machines.

Rule: nothing is decided by what is written here. A full disk costs rows, never the run; and where nothing was reported
since the last time, nothing is written, so that a thousand quiet jobs cost nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import msgspec
import structlog

from ..status import JobStatus
from . import history, rundir
from .history import MemberRow, Row, Rows

EVERY_S = 2.0
LAST_S = 5.0  # for what is written at the end

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
        threads: Executor | None = None,
    ) -> None:
        """`threads`: which write, so that a slow disk holds nobody up; without them a thread of its own."""
        self.folder = folder
        self.status = status
        self.changes = changes
        self.followers = list(followers)
        self.every_s = every_s
        self.threads = threads
        self.own: ThreadPoolExecutor | None = None
        self.job = Rows(folder / history.JOB, Row, history.JOB_ROWS, every_s)
        self.members = Rows(folder / history.MEMBERS, MemberRow, history.MEMBER_ROWS, every_s)
        self.seen = -1
        self.full = False  # the disk was, the last time
        self.task: asyncio.Task[None] | None = None
        self.writing: asyncio.Future[None] | None = None

    def start(self) -> None:
        if self.threads is None:
            self.threads = self.own = ThreadPoolExecutor(1, "zml-history")
        self.task = asyncio.ensure_future(self._run())

    async def stop(self) -> None:
        """With a last row that says how it stands now. May be called twice, and without a start."""
        if self.task is None:
            return
        task, self.task = self.task, None
        task.cancel()
        await asyncio.wait({task})
        if self.writing is not None:
            await asyncio.wait({self.writing}, timeout=LAST_S)
        self._begin()
        if self.writing is not None:
            await asyncio.wait({self.writing}, timeout=LAST_S)
        if self.own is not None:
            self.own.shutdown(wait=False)

    async def _run(self) -> None:
        # Not all of a coordinator's jobs at the same moment.
        await asyncio.sleep(self.every_s * random.random())
        while True:
            self._begin()
            await asyncio.sleep(self.every_s)

    def _begin(self) -> None:
        """Have written down what is new, if anything is and the last time is over."""
        if self.writing is not None and not self.writing.done():
            return
        try:
            status = self.look()
            if status is not None:
                self.writing = asyncio.get_running_loop().run_in_executor(self.threads, self.write, status)
        except Exception:
            log.exception("the run's history is not written", folder=str(self.folder))

    def look(self) -> JobStatus | None:
        """What is new, told to the followers; None if nothing is."""
        changes = self.changes()
        if changes == self.seen:
            return None
        self.seen = changes
        status = self.status()
        for follower in list(self.followers):
            try:
                follower(status)
            except Exception:
                log.exception("a follower of the run is told nothing more", folder=str(self.folder))
                self.followers.remove(follower)
        return status

    def write(self, status: JobStatus) -> None:
        """In one thread at a time."""
        try:
            rundir.write(self.folder / rundir.NOW, msgspec.json.encode(status))
            if status.steps > 0:
                self.job.add(history.job_row(status))
                self.members.add(history.member_row(status))
            self.full = False
        except Exception as error:  # nothing depends on it, whatever it is
            if not self.full:
                log.warning("the run's history is not written", folder=str(self.folder), because=repr(error))
            self.full = True
