"""Jobs that are over go with their files, and archives that no job knows: as the cluster's owner wants it.

Rule: what is to go is in the journal before anything is deleted, and stays there until it is gone: whoever goes on with
the cluster finishes that. What others need stays: jobs that they come after, and whose folders they name.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..scheduler.cluster import events
from ..scheduler.cluster.retention import DAY_S, Keep, expired
from ..scheduler.ids import JobId
from .docket import Docket

if TYPE_CHECKING:
    from .hub import Hub

LOOK_S = 60.0
AT_ONCE = 50  # jobs; the others at the next look
UNUSED_S = DAY_S  # an archive may have been sent for a job that is still to come

log = structlog.get_logger()


class Remains:
    """What jobs have left on disk."""

    def __init__(self, folder: Path, docket: Docket) -> None:
        self.folder = folder
        self.docket = docket
        self.going: dict[str, asyncio.Task[None]] = {}

    def needed(self) -> dict[JobId, JobId]:
        """Jobs that somebody who is not over needs, and who that is: it comes after them, or names their files."""
        path = re.compile(re.escape(str(self.folder / "jobs")) + r"/(j[0-9]+)(?![0-9])")
        found: dict[JobId, JobId] = {}
        for name in self.docket.machine.cluster.jobs:
            asked = self.docket.facts.records[name].accepted.submission
            named = path.findall(msgspec.json.encode(asked).decode())
            for other in {*map(JobId, asked.after), *map(JobId, named)} - {name}:
                found.setdefault(other, name)
        return found

    def discard(self, job: str) -> None:
        """Delete its folder, and say so in the journal."""
        if job not in self.going:
            self.going[job] = asyncio.ensure_future(self._discard(job))

    async def _discard(self, job: str) -> None:
        try:
            await asyncio.to_thread(self._remove, self.folder / "jobs" / job)
            self.docket.discarded(job)
        except OSError as error:
            log.warning("job not deleted", job=job, because=str(error))  # at the next look, again
        finally:
            del self.going[job]

    @staticmethod
    def _remove(path: Path) -> None:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            pass  # it never began, or is gone

    async def close(self) -> None:
        for task in list(self.going.values()):
            task.cancel()
        await asyncio.gather(*self.going.values(), return_exceptions=True)

    # -- archives --------------------------------------------------------------------------------------------

    def unused(self) -> Iterator[Path]:
        """Archives of no job that is known, and halves of some, which nobody has asked about for a while."""
        records = self.docket.facts.records.values()
        used = {record.accepted.submission.archive for record in records}
        before = time.time() - UNUSED_S
        for path in (self.folder / "archives").glob("*"):
            if path.name.partition(".")[0] not in used and path.stat().st_mtime < before:
                yield path


class Retention:
    """Looks now and then, as long as the cluster is served. `run` until cancelled."""

    def __init__(self, hub: Hub, keep: Keep) -> None:
        self.hub = hub
        self.keep = keep

    async def run(self) -> None:
        while True:
            try:
                self.look()
            except OSError as error:
                log.warning("nothing is deleted", because=str(error))
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        hub = self.hub
        for job in list(hub.docket.facts.discarding):
            hub.remains.discard(job)
        if self.keep.everything or not hub.docket.settled():
            return
        gone = expired(hub.machine.cluster, self.keep, hub.remains.needed(), hub.docket.now)
        for job, because in gone[:AT_ONCE]:
            hub.dispatch(events.Discarded(job, because))
        # Without a pause between looking and deleting: nobody can submit a job with it in between.
        for path in hub.remains.unused():
            path.unlink(missing_ok=True)
            log.info("archive deleted", archive=path.name, because="no job knows it")
