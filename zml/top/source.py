"""Where the picture comes from: a coordinator that is asked, the files of a run directory, or a cluster's API.

Rule: a look never raises. Where the coordinator does not answer, the files tell what it did last, and the look says
so; each further look tries again, at the address that the run directory names by then.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .. import observe
from ..errors import UNREACHABLE, USAGE, ZmlError
from ..runs import history, rundir
from .known import Past, Seen

if TYPE_CHECKING:
    from ..cluster.client import Client
    from ..cluster.jobs import JobView
    from ..config import Settings
    from ..status import JobStatus
    from ..transport import Endpoint

CONNECT_S = 2.0
MEMBER_ROWS = 30  # of the past: a minute
FIRST_S = 15.0  # for the first look
STOP_S = 2.0
AWAY = "coordinator away: from its files"


class Source(Protocol):
    """Something to look at. Belongs to one event loop."""

    async def look(self) -> Seen: ...

    async def close(self) -> None: ...


class Run:
    """One job, by its coordinator's address, or by its run directory, or both."""

    def __init__(self, settings: Settings, folder: Path | None, inside: str = "") -> None:
        self.settings = settings
        self.folder = folder
        self.inside = inside
        self.endpoint: Endpoint | None = None
        self.told = False  # the past

    async def look(self) -> Seen:
        now = time.time()
        trouble = ""
        status = rundir.last_status(self.folder) if self.folder is not None else None
        if status is not None:
            await self.close()
            return self._seen(status, str(self.folder), "", now)
        try:
            status = await self._ask()
            return self._seen(status, f"coordinator at {', '.join(self.settings.coordinator)}", "", now)
        except ZmlError as error:
            await self.close()
            trouble = error.what
        if self.folder is None:
            return Seen(place="", trouble=trouble, at=now, inside=self.inside)
        status = rundir.newest_status(self.folder)
        if status is None:
            return Seen(place=str(self.folder), trouble=trouble, at=now, inside=self.inside)
        return self._seen(status, str(self.folder), "" if status.over else AWAY, now)

    def _seen(self, status: JobStatus, place: str, trouble: str, now: float) -> Seen:
        past = None
        if not self.told and self.folder is not None:
            past, self.told = read_past(self.folder), True
        return Seen(status=status, place=place, trouble=trouble, past=past, at=now, inside=self.inside)

    async def _ask(self) -> JobStatus:
        """Over the connection there is, or a new one."""
        if self.endpoint is None:
            if self.folder is not None:
                here = rundir.listening(self.folder)
                if here is None:
                    raise ZmlError(UNREACHABLE, f"no coordinator listens for {self.folder} yet")
                self.settings = replace(
                    self.settings, coordinator=tuple(here.addresses), job=here.job or self.settings.job
                )
            self.endpoint = await observe.connect(self.settings, CONNECT_S)
        return await observe.status(self.endpoint, self.settings.job)

    async def close(self) -> None:
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            await endpoint.close()


def read_past(folder: Path) -> Past:
    rows = list(history.read(folder / history.JOB, history.Row))
    members = list(history.read(folder / history.MEMBERS, history.MemberRow))
    return Past(rows, members[-MEMBER_ROWS:])


class Cluster:
    """The jobs of a coordinator of many."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self.client = client
        self.settings = settings

    async def look(self) -> Seen:
        return await asyncio.to_thread(self._look)

    def _look(self) -> Seen:
        now = time.time()
        try:
            return Seen(jobs=self._jobs(), nodes=self.client.nodes(), place=self.client.server, at=now)
        except ZmlError as error:
            return Seen(jobs=[], place=self.client.server, trouble=error.what, at=now)

    def _jobs(self) -> list[JobView]:
        from ..web.bodies import ENDS

        return [job for job in self.client.jobs() if job.state not in ENDS]

    def run_of(self, job: str) -> Run:
        """The run of a job's newest attempt. Raises ZmlError."""
        view = self.client.job(job)
        if not view.attempts:
            raise ZmlError(USAGE, f"{view.id} has not begun: {view.because or view.state.lower()}")
        folder = Path(view.attempts[-1].run_dir)
        if not folder.is_dir():
            raise ZmlError(USAGE, f"the run directory {folder} is not on this machine")
        return Run(self.settings, folder, inside=job)

    async def close(self) -> None:
        self.client.close()


class Lookout:
    """Looks once per interval, in a thread of its own, and keeps the newest look for whoever takes it."""

    def __init__(self, source: Source, interval_s: float, wake: Callable[[], None]) -> None:
        """`wake` is called from the thread when there is something new."""
        self.source = source
        self.interval_s = interval_s
        self.wake = wake
        self.newest: queue.Queue[Seen] = queue.Queue(1)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.turn = asyncio.Event()
        self.stopping = False
        self.job = ""  # that is to be watched, of a cluster; empty: all of it
        self.began = threading.Event()
        self.thread = threading.Thread(target=self._main, name="lookout", daemon=True)

    def start(self) -> None:
        self.thread.start()
        self.began.wait(STOP_S)

    def take(self, timeout_s: float | None = None) -> Seen | None:
        """The newest look, once; None where there is none yet."""
        try:
            return self.newest.get(timeout=timeout_s) if timeout_s else self.newest.get_nowait()
        except queue.Empty:
            return None

    def watch(self, job: str) -> None:
        """This job's run from now on; with an empty name, the cluster again."""
        self.job = job
        self._nudge()

    def stop(self) -> None:
        self.stopping = True
        self._nudge()
        self.thread.join(STOP_S)

    def _nudge(self) -> None:
        if self.loop is not None and not self.loop.is_closed():
            try:
                self.loop.call_soon_threadsafe(self.turn.set)
            except RuntimeError:  # it has closed since
                return

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.began.set()
        run: Source | None = None
        try:
            while not self.stopping:
                self.turn.clear()
                job = self.job
                if run is not None and (not job or getattr(run, "inside", "") != job):
                    await run.close()
                    run = None
                seen: Seen | None = None
                if job and run is None:
                    try:
                        run = await asyncio.to_thread(self._enter, job)
                    except ZmlError as error:
                        seen = Seen(trouble=error.what, at=time.time(), inside=job)
                self._keep(seen or await self._look(run or self.source, job))
                try:
                    await asyncio.wait_for(self.turn.wait(), self.interval_s)
                except TimeoutError:
                    continue
        finally:
            if run is not None:
                await run.close()
            await self.source.close()

    async def _look(self, source: Source, job: str) -> Seen:
        """Whatever goes wrong is seen, and the next look may be better."""
        try:
            return await source.look()
        except Exception as error:
            return Seen(trouble=f"{type(error).__name__}: {error}", at=time.time(), inside=job)

    def _enter(self, job: str) -> Source:
        assert isinstance(self.source, Cluster)
        return self.source.run_of(job)

    def _keep(self, seen: Seen) -> None:
        while True:
            try:
                self.newest.put_nowait(seen)
                break
            except queue.Full:
                self.take()
        self.wake()
