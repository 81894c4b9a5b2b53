"""The attempts that live: each a coordinator of its own, with its run directory, on the endpoint that all share.

Rule: an attempt's coordinator is what `zml coordinator` is to one job, journal and all; when this process is started
again, each goes on from its own journal. Whatever goes wrong with one attempt is that attempt's end and nobody else's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from .. import __version__
from ..checkpoint import Checkpoint, Skipped
from ..checkpoint.finding import find, load_from
from ..config import Resolved, Settings, resolve
from ..coordinator.coordinating import SYNC_S, job_spec, keep_checkpoints, rules_of
from ..coordinator.coordinator import Coordinator
from ..errors import NEVER_JOINED, ZmlError
from ..journal import Journal
from ..runs import rundir
from ..runs.events import EventLog
from ..runs.recorder import Recorder
from ..scheduler import events as job_events
from ..scheduler.cluster import events
from ..scheduler.cluster.events import Outcome
from ..scheduler.ids import JobId
from ..scheduler.machine import Machine
from ..scheduler.state import Cause, Running
from ..transport import Endpoint, Handler
from .branch import Branch
from .jobs import Submission

# Attempts whose files are read at the same time: more threads wait for each other, where the disk is fast.
READING = 2
READ_FIRST_S = 1.0  # that those of attempts which go on are read before anybody is listened to

log = structlog.get_logger()
T = TypeVar("T")

# Slower than alone: thousands of members may talk to one process, and nodes tell of deaths at once.
ATTEMPT = {"heartbeat_s": 1.0, "lease_s": 5.0}
# Heartbeats a second of all members together: a fifth of a core (`python bench/jobs.py`). That a process or a node is
# gone is known sooner: nodes tell of processes, and have leases of their own.
BEATS = 1000
RECORD_S = 5.0  # between two rows of a job's history
# Of one that came to its end, and whose coordinator was asked for nothing.
ALONE = f", and no script called zml.join: nothing was trained together [{NEVER_JOINED}]"
OUTCOMES: dict[Cause, Outcome] = {
    Cause.WORKERS_DONE: Outcome.SUCCEEDED,
    Cause.WORKERS_DRAINED: Outcome.DRAINED,
    Cause.CANCEL_ASKED: Outcome.CANCELLED,
    Cause.SCRIPT_FAILED: Outcome.FAILED,
    Cause.LAYOUT_REFUSED: Outcome.FAILED,
    Cause.SHARD_LOST: Outcome.LOST,
    Cause.WORKERS_LOST: Outcome.LOST,
}
"""How an attempt ended, by what ended it."""


def attempt_name(job: str, number: int) -> JobId:
    """What an attempt is called where only one job is known: the name of the job to its members."""
    return JobId(f"{job}.{number}")


@dataclass(frozen=True, slots=True)
class Files:
    """What was read of an attempt's run directory. `here`: where it says that its coordinator listens."""

    resumed: Checkpoint | None
    journal: Journal
    here: rundir.Listening | None


@dataclass(slots=True)
class Life:
    """An attempt that is not over."""

    job: JobId
    number: int
    task: asyncio.Task[None]
    members: int
    coordinator: Coordinator | None = None  # once its journal is read
    drain: str = ""  # what it was told before that
    stop: str = ""
    over: bool = False  # its coordinator has come to its end


class Attempts:
    """`dispatch` is told how they begin and end."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        trunk: Callable[[], Endpoint],
        dispatch: Callable[[events.Event], object],
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.trunk = trunk
        self.dispatch = dispatch
        self.lives: dict[JobId, Life] = {}
        self.members = 0  # of all of them
        self.returning: set[JobId] = set()  # those that are to go on and do not yet
        self.not_back: list[JobId] = []  # those of them that could not
        self.journals: set[Journal] = set()
        self.syncing: asyncio.Task[None] | None = None
        # Of their own: with thousands of attempts to be read, others who need a thread would wait behind them.
        self.threads = ThreadPoolExecutor(READING, "zml-attempts")
        self.ahead: dict[JobId, asyncio.Future[Files]] = {}  # of those that go on
        # A disk that is slow costs rows and holds nobody up.
        self.history = ThreadPoolExecutor(1, "zml-history")

    def run_dir(self, job: str, number: int) -> Path:
        return self.folder / "jobs" / job / str(number)

    async def read_ahead(self, going_on: Iterable[tuple[JobId, int, int, Submission]]) -> None:
        """Read the files of attempts that are to be opened, while nobody is heard: beside the thread that hears all it
        takes several times as long. A slow disk holds nobody up for longer than `READ_FIRST_S`."""
        for job, number, workers, submission in going_on:
            name = attempt_name(job, number)
            self.returning.add(name)
            self.ahead[name] = self._in_thread(self._read, name, job, number, workers, submission)
        if self.ahead:
            await asyncio.wait(self.ahead.values(), timeout=READ_FIRST_S)

    def open(self, job: JobId, number: int, workers: int, submission: Submission) -> None:
        """Begin, or go on with what the journal in its run directory holds."""
        name = attempt_name(job, number)
        if name not in self.lives:
            task = asyncio.ensure_future(self._live(name, job, number, workers, submission))
            members = workers + submission.shards
            self.lives[name] = Life(job, number, task, members)
            self.members += members

    def drain(self, job: JobId, number: int, because: str) -> None:
        if (life := self.lives.get(attempt_name(job, number))) is not None:
            life.drain = because
            self._pass_on(life)

    def stop(self, job: JobId, number: int, because: str) -> None:
        if (life := self.lives.get(attempt_name(job, number))) is not None:
            life.stop = because
            self._pass_on(life)

    def bury(self, job: JobId, number: int, slot: str, because: str) -> None:
        """A member's process is gone."""
        life = self.lives.get(attempt_name(job, number))
        if life is None or life.coordinator is None:
            return
        hall = life.coordinator
        entered = hall.facts.entered.get(slot)
        if entered is not None and hall.is_current(slot, entered.incarnation):
            hall.dispatch(job_events.Died(hall.job, slot, entered.incarnation, because))

    def close(self, job: JobId, number: int) -> None:
        """It is over, or is to be, whatever it waits for."""
        name = attempt_name(job, number)
        if (unused := self.ahead.pop(name, None)) is not None:
            unused.add_done_callback(_close)
        self._returned(name, goes_on=False)
        life = self.lives.pop(name, None)
        if life is not None:
            self.members -= life.members
            life.task.cancel()

    async def close_all(self) -> None:
        for unused in self.ahead.values():
            unused.add_done_callback(_close)
        tasks = [life.task for life in self.lives.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.syncing is not None:
            self.syncing.cancel()
            await asyncio.wait({self.syncing})
        for threads in (self.threads, self.history):
            threads.shutdown(wait=False, cancel_futures=True)

    def _returned(self, name: JobId, *, goes_on: bool) -> None:
        if name in self.returning:
            self.returning.discard(name)
            if not goes_on:
                self.not_back.append(name)
            if not self.returning:
                log.info("attempts are back", but_for=self.not_back)

    def _pass_on(self, life: Life) -> None:
        hall = life.coordinator
        if hall is None or hall.finished is None or hall.finished.done():
            return
        if life.stop:
            hall.dispatch(job_events.Cancelled(hall.job, life.stop))
        elif life.drain:
            hall.dispatch(job_events.DrainAsked(hall.job, life.drain))

    # -- one life ------------------------------------------------------------------------------------------

    async def _live(self, name: JobId, job: JobId, number: int, workers: int, submission: Submission) -> None:
        try:
            outcome, code, because = await self._serve(name, job, number, workers, submission)
        except (ZmlError, OSError) as error:
            log.error("attempt cannot go on", attempt=name, because=str(error))
            outcome, code, because = Outcome.LOST, 1, str(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("attempt ended by a mistake of the coordinator", attempt=name)
            outcome, code, because = Outcome.LOST, 1, f"{type(error).__name__}: {error}"
        self._returned(name, goes_on=False)
        self.dispatch(events.Ended(job, number, outcome, code, because))

    async def _serve(
        self, name: JobId, job: JobId, number: int, workers: int, submission: Submission
    ) -> tuple[Outcome, int, str]:
        folder, life = self.run_dir(job, number), self.lives[name]
        settings = resolve_for(submission, workers).settings
        files = await self._prepare(name, job, number, workers, submission)
        journal = files.journal
        try:
            coordinator = Coordinator(
                name,
                job_spec(settings, submission.script, submission.args, submission.folder),
                Machine(rules_of(settings)),
                self._branch,
                EventLog(folder / rundir.EVENTS),
                heartbeat_s=settings.heartbeat_s,
                run_dir=str(folder),
                journal=journal,
                resumed=files.resumed,
                slower=lambda: slower(settings, submission, self.members),
            )
        except BaseException:
            journal.close()
            raise
        self._keep_synced(journal)
        recorder = Recorder(folder, coordinator.status, coordinator.changes, (), RECORD_S, self.history)
        began: asyncio.Task[None] | None = None
        try:
            await coordinator.start()
            keep_checkpoints(coordinator, folder, settings)
            recorder.start()
            life.coordinator = coordinator
            self._returned(name, goes_on=True)
            began = asyncio.ensure_future(self._tell_beginning(coordinator, job, number))
            self._pass_on(life)
            code = await coordinator.run()
            status = coordinator.status()
            rundir.write(folder / rundir.STATUS, msgspec.json.encode(status))
            over = coordinator.machine.over[coordinator.job]
            because = over.because + (ALONE if status.apart else "")
            return OUTCOMES[over.cause], code, because
        finally:
            await recorder.stop()
            if began is not None:
                began.cancel()
            self.journals.discard(journal)
            life.coordinator, life.over = None, True
            await coordinator.close()

    async def _prepare(
        self, name: JobId, job: JobId, number: int, workers: int, submission: Submission
    ) -> Files:
        """What needs the disk, in a thread: others are heard meanwhile."""
        reading = self.ahead.pop(name, None)
        if reading is None:
            reading = self._in_thread(self._read, name, job, number, workers, submission)
        try:
            files = reading.result() if reading.done() else await asyncio.shield(reading)
        except asyncio.CancelledError:  # nobody will use the journal that it is about to open
            reading.add_done_callback(_close)
            raise
        if files.here != (here := self._here(name)):  # it was read before that was known
            try:
                # Not behind the journals that are still to be read, nor before others who need a thread.
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self.history, _tell_where, self.run_dir(job, number), here)
            except BaseException:
                files.journal.close()
                raise
        return files

    def _in_thread(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self.threads, work, *args)

    def _here(self, name: JobId) -> rundir.Listening:
        return rundir.Listening(list(self.trunk().addresses), 0, name)

    def _read(self, name: JobId, job: JobId, number: int, workers: int, submission: Submission) -> Files:
        """In a thread. Raises ZmlError, OSError."""
        if name not in self.lives and name not in self.returning:  # nor is its folder to be made again
            raise FileNotFoundError(f"attempt {name} was closed before it was read")
        folder = self.run_dir(job, number)
        (folder / rundir.LOGS).mkdir(parents=True, exist_ok=True)
        describe(folder, resolve_for(submission, workers), submission)
        journal = Journal(folder / rundir.COORDINATOR_STATE, held_already=True)
        try:
            # Where it has begun, it is to be known again and not to be read.
            resumed = self._newest(job, number, deep=journal.empty)
            before, here = rundir.listening(folder), self._here(name)
            if here.addresses and before != here:
                before = _tell_where(folder, here)
        except BaseException:
            journal.close()
            raise
        return Files(resumed, journal, before)

    def _keep_synced(self, journal: Journal) -> None:
        """As `coordinator.coordinating.keep_synced`, of all of them together: each alone would wake twice a second."""
        self.journals.add(journal)
        if self.syncing is None:
            self.syncing = asyncio.ensure_future(self._sync())

    async def _sync(self) -> None:
        def sync(journals: list[Journal]) -> None:
            for journal in journals:
                journal.sync()

        while True:
            await asyncio.sleep(SYNC_S)
            if dirty := [journal for journal in self.journals if journal.dirty]:
                await asyncio.to_thread(sync, dirty)

    def _branch(self, handler: Handler) -> Endpoint:
        return Branch(self.trunk(), handler)

    async def _tell_beginning(self, coordinator: Coordinator, job: JobId, number: int) -> None:
        def runs() -> bool:
            running = coordinator.docket.running
            return running is not None and isinstance(running.phase, Running)

        while not await coordinator.until(runs):
            pass
        self.dispatch(events.Began(job, number))

    def _newest(self, job: str, number: int, *, deep: bool) -> Checkpoint | None:
        """The newest checkpoint of the attempts before that verifies; `deep`: to its last byte."""
        for before in range(number - 1, 0, -1):
            told = partial(_skipped, job, before)
            try:
                return load_from(find(self.run_dir(job, before)), told, deep)
            except ZmlError as error:
                log.info("no checkpoint", job=job, attempt=before, because=str(error))
        return None


def _close(read: asyncio.Future[Files]) -> None:
    if not (read.cancelled() or read.exception()):
        read.result().journal.close()


def _tell_where(folder: Path, here: rundir.Listening) -> rundir.Listening:
    """To whoever looks into a run directory."""
    rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))
    return here


def _skipped(job: str, attempt: int, each: Skipped) -> None:
    log.warning("checkpoint skipped", job=job, attempt=attempt, name=each.name, because=each.because)


def chosen(submission: Submission) -> dict[str, Any]:
    """What was asked for of the training, and what suits attempts otherwise."""
    return {**ATTEMPT, **submission.settings}


def resolve_for(submission: Submission, workers: int) -> Resolved:
    """The settings of an attempt. Raises ZmlError for a person to read."""
    asked = chosen(submission)
    if (
        asked.get("lr_scaling", "none") != "none"
    ):  # else each attempt's rate would be meant for another number
        asked.setdefault("lr_base_workers", submission.bounds[0])
    asked |= {"workers": workers, "shards": submission.shards, "replicas": submission.replicas}
    return _resolved(msgspec.json.encode(asked))


def slower(settings: Settings, submission: Submission, members: int) -> float:
    """How many times seldomer an attempt's members are to be heard while there are so many in all; one that was asked
    for otherwise is not touched."""
    if not ATTEMPT.keys().isdisjoint(submission.settings):
        return 1.0
    return max(1.0, members / (BEATS * settings.heartbeat_s))


@lru_cache(256)
def _resolved(asked: bytes) -> Resolved:
    """The same for many jobs, mostly."""
    return resolve(msgspec.json.decode(asked), {}, "/dev/null")  # the coordinator's zml.toml is not for jobs


def describe(folder: Path, resolved: Resolved, submission: Submission) -> None:
    """config.json, as `zml run` writes it: `zml resume` and `zml status` read it. Once."""
    if (folder / rundir.CONFIG).exists():
        return
    about = {
        "zml": __version__,
        "python": sys.version.split()[0],
        "started_at": time.time(),
        "folder": submission.folder,
        "script": submission.script,
        "args": submission.args,
        "cpu": not submission.gpus,
        **resolved.as_json(),
    }
    rundir.write(folder / rundir.CONFIG, (json.dumps(about, indent=2) + "\n").encode())
