"""`zml ps`: the process around shards. Control in the main loop, gradients and parameters in a thread of their own.

Rules: heartbeats never wait for an optimizer step, and a shard's state is touched by the bulk thread alone. What a
former process has left in the push logs is read before anything is served.

It serves the shard that has its name, unless that one lives elsewhere; it also keeps copies of others, and serves such
a shard too once the copy is promoted, under its name and at an address of its own (`scheduler.homes` decides). Told to
leave, it first hands over what it has, if there is another process.

Both threads share Python's lock. Measured on two cores with a load of nine: the latest heartbeat came 0.13 s late while
the codec's kernels were compiled, and 0.6 s at the first Adam step on 100 million parameters. A lease is 1.5 s.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct

from ..checkpoint.folder import is_seen
from ..compiled import compile_kernels
from ..compression import parse
from ..doctor.answering import Examinee
from ..doctor.links import probed
from ..errors import EX_TEMPFAIL, FENCED, ZmlError, ended_by
from ..figures import ShardFigures
from ..lease import COORDINATOR, Lease, ask, join
from ..messages import (
    Adopt,
    Align,
    Assign,
    Cede,
    Copy,
    Examine,
    Fenced,
    Gauge,
    Graft,
    Hold,
    Mark,
    Message,
    Ok,
    Pair,
    Probe,
    Promote,
    Pulse,
    Release,
    Retire,
    Roster,
    Settle,
    Snap,
    Stop,
    Vacate,
    Vacated,
    Wait,
    Write,
)
from ..metrics.process import resident_bytes
from ..runs.rundir import LOGS
from ..stack import answer_signal
from ..transport import Endpoint, Handler, Refusal, TransportError
from .backup import Backup
from .begin import Sees
from .counts import figures
from .covering import covered
from .porter import Porter
from .pushlog import PushLog
from .shard import Shard
from .tenancy import InBulk, Tenancy

if TYPE_CHECKING:
    from ..config import Settings

GAUGE_S = 1.0  # between two words on what the shards see

log = structlog.get_logger()


class Ps(Tenancy):
    """A process' life as a member: join, read what a former self has left, take orders, end.

    `bulk` is called in the bulk thread, as are `listen` and `dial`, which make endpoints there under a shard's name and
    for a mirror. `state` is the folder of this shard's push log, for a run directory that the coordinator has named;
    None where state may die with the process. Other logs lie beside it. `sees` says whether a folder of the
    coordinator's is on this machine.
    """

    def __init__(
        self,
        index: int,
        settings: Settings,
        control: Callable[..., Endpoint],
        in_bulk: InBulk,
        state: Callable[[str], Path | None] = lambda run_dir: None,
        listen: Callable[[str, Handler], Awaitable[Endpoint]] | None = None,
        dial: Callable[[str], Endpoint] | None = None,
        sees: Sees = is_seen,
    ) -> None:
        self.name = f"p{index}"
        self.state = state
        self.listen = listen
        self.dial = dial
        self.settings = settings
        self.in_bulk = in_bulk
        self.metrics = ""  # where this process is scraped
        self.figures: dict[str, ShardFigures] = {}  # of the shards that live here, as they were told last
        self.cores: dict[str, Shard] = {}
        self.homes: dict[str, int] = {}
        self.logs: dict[str, PushLog] = {}
        self.listeners: dict[str, Endpoint] = {}
        self.backups: dict[str, Backup] = {}
        self.grafts: dict[str, tuple[str, list[memoryview]]] = {}
        self.ceded = count(1)
        self.taking: dict[str, tuple[int, asyncio.Task[Message]]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()
        self.lease: Lease | None = None
        self.vacating: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.over: asyncio.Future[int] = self.loop.create_future()
        # A name for this process alone: a second one that wants to be the same shard is told apart.
        self.endpoint = control(f"{self.name}-{socket.gethostname()}-{os.getpid()}", self.handle)
        self.examinee = Examinee(self.endpoint)
        self.porter = Porter(settings, control, sees)

    @property
    def core(self) -> Shard | None:
        """The shard of this process' name, if it lives here."""
        return self.cores.get(self.name)

    async def run(self, addresses: list[str]) -> int:
        """Join and serve until the job is over; returns the exit code."""
        await self.endpoint.start()
        keeping: asyncio.Task[ZmlError] | None = None
        try:
            self.lease = await join(
                self.endpoint,
                self.settings,
                "shard",
                self.name,
                addresses=addresses,
                metrics=self.metrics,
            )
            self.porter.lease = self.lease
            if logs := self._logs(self.lease):
                answer_signal(logs, self.name)  # where people look for it
            keeping = asyncio.ensure_future(self.lease.keep())
            keeping.add_done_callback(lambda task: None if task.cancelled() else self.finish(task.result()))
            serves = self.lease.joined.serves
            self.homes = {shard: incarnation for shard, incarnation, _ in serves}
            for shard, _, name in serves:
                await self._recover(self.lease, shard, name)
            self._spawn(self._tell_gauges(self.lease))
            return await self.over
        finally:
            for task in (keeping, self.vacating, *(task for _, task in self.taking.values()), *self.tasks):
                if task is not None:
                    task.cancel()
            await self.in_bulk(self._end_bulk)
            await self.endpoint.close()
            for pushes in self.logs.values():
                pushes.close()

    def _logs(self, lease: Lease) -> Path | None:
        """Those of the run, if its directory is on this machine."""
        run_dir = self.settings.run_dir or lease.joined.run_dir
        folder = Path(run_dir, LOGS)
        return folder if run_dir and folder.is_dir() else None

    def die(self) -> None:
        """End without a word, as a process that is killed: for tests, where several live in one."""
        for task in self.tasks:
            task.cancel()
        self._end_of_all()
        for pushes in self.logs.values():
            pushes.close()

    async def _end_bulk(self) -> None:
        self._end_of_all()
        if self.vacating is not None:
            for backup in self.backups.values():
                backup.drop()  # the job goes on, and it is good for this process alone
        for listener in list(self.listeners.values()):
            await listener.close()

    def finish(self, result: int | ZmlError) -> None:
        if self.over.done():
            return
        if isinstance(result, ZmlError):
            self.over.set_exception(result)
        else:
            self.over.set_result(result)

    def leave(self, because: str) -> None:
        """A signal: this process hands over what it has, says goodbye and ends. At the second one it only says goodbye,
        and its job waits for another or goes on with the backup."""
        if self.lease is None or self.leaving is not None:
            self.finish(ended_by(because))
        elif self.vacating is None:
            self.vacating = asyncio.ensure_future(self._vacate(self.lease, because))
        else:
            self.vacating.cancel()
            self.leaving = asyncio.ensure_future(self._leave(self.lease, because, ended_by(because)))

    async def _vacate(self, lease: Lease, because: str) -> None:
        handed_over = await self._hand_over(lease, because)
        code = EX_TEMPFAIL if handed_over and because != "SIGINT" else ended_by(because)
        self.leaving = asyncio.ensure_future(self._leave(lease, because, code))

    async def _hand_over(self, lease: Lease, because: str) -> bool:
        """Until nothing lives here any more; False where there is nobody to take it, or not in time."""
        joined, began = lease.joined, self.loop.time()
        wish = Vacate(joined.job, joined.member, joined.incarnation, because)
        log.info("leaving", member=joined.member, because=because, at_most_s=self.settings.drain_s)
        while (left_s := began + self.settings.drain_s - self.loop.time()) > 0:
            try:
                answer = (await ask(self.endpoint, wish, within_s=left_s)).message
            except TransportError as error:
                log.warning("not handed over", member=joined.member, because=str(error))
                return False
            if isinstance(answer, Vacated):
                if answer.handed_over:
                    seconds = round(self.loop.time() - began, 3)
                    log.info("handed over", member=joined.member, seconds=seconds)
                return answer.handed_over
            assert isinstance(answer, Wait), answer
        log.warning("not handed over in time", member=joined.member, shards=sorted(self.homes))
        return False

    async def _leave(self, lease: Lease, because: str, code: int) -> None:
        await lease.leave(because)
        self.finish(code)

    async def _stop(self, lease: Lease, because: str) -> None:
        def let_go() -> None:
            for core in list(self.cores.values()):
                if core.mirror is not None:
                    core.mirror.let_go()

        if self.vacating is not None:
            self.vacating.cancel()
        await self.in_bulk(let_go)
        await self._leave(lease, because, 0)

    async def _tell_gauges(self, lease: Lease) -> None:
        """What the shards here see of their updates, now and then."""
        joined = lease.joined

        def seen(memory_bytes: int) -> list[Gauge]:
            return [
                core.pace.gauge(
                    joined.job, joined.member, joined.incarnation, core.steps, figures(core, memory_bytes)
                )
                for core in list(self.cores.values())  # a backup counts where it is served
            ]

        while True:
            memory_bytes = resident_bytes() >> 20 << 20  # what comes and goes by pages is no news
            gauges = await self.in_bulk(partial(seen, memory_bytes))
            self.figures = {gauge.shard: gauge.figures for gauge in gauges}
            for gauge in gauges:
                self.endpoint.notify(COORDINATOR, gauge)
            await asyncio.sleep(GAUGE_S)

    # -- messages ------------------------------------------------------------------------------------

    def bulk(self, peer: str, message: Struct, payload: memoryview | None) -> Any:
        """From a worker, or from a shard that keeps its copy here; in the bulk thread."""
        if isinstance(message, Probe):
            return probed(message)
        if self.lease is None:
            raise Refusal("early", f"{self.name} has not joined yet")
        if isinstance(message, Copy):
            return self._copy(self.lease, message, payload)
        if isinstance(message, Graft):
            return self._graft(peer, message, payload)
        return self._core(self.name).handle(peer, message, payload)

    def handle(
        self, peer: str, message: Struct, payload: memoryview | None
    ) -> Message | Awaitable[Any] | None:
        """From the coordinator; in the main loop."""
        if peer != COORDINATOR:
            raise Refusal("unexpected", "a shard takes orders from the coordinator only")
        match message:
            case Pulse():
                if self.lease is not None:
                    self.lease.heard(message)
                return None
            case Assign() | Roster() | Settle() | Mark() | Hold() | Align() | Snap() | Release():
                return self._order(message, bytes(payload or b""))
            case Cede():
                return self._cede(message, bytes(payload or b""))
            case Write():
                return self.porter.write(self._core(message.shard), message)
            case Pair():
                return self._pair(message)
            case Promote() | Adopt():
                return self._take_over(message)
            case Retire():
                return self._retire(message)
            case Examine():
                there = self.lease.joined.run_dir if self.lease is not None else ""
                return self.examinee.answer(message, self.settings.run_dir or there)
            case Stop():
                if self.lease is not None and self.leaving is None:
                    self.leaving = asyncio.ensure_future(self._stop(self.lease, message.because))
                return Ok()
            case Fenced():
                if self.lease is not None and self.lease.is_mine(message) and self.leaving is None:
                    who = f"{message.member}#{message.incarnation}"
                    self.finish(ZmlError(FENCED, f"{who} was fenced: {message.because}"))
                return None
        raise Refusal("unexpected", f"a shard does not take {type(message).__name__}")

    async def _order(
        self, message: Assign | Roster | Settle | Mark | Hold | Align | Snap | Release, payload: bytes
    ) -> Any:
        core = self._core(message.shard)
        if isinstance(message, Assign):
            await self._prepare(core, message, payload)
        answer = await self.in_bulk(lambda: covered(core, core.order(message, payload)))
        if isinstance(message, Assign):
            pushes = self.logs.get(core.name)
            if message.checkpoint and pushes is not None and not pushes.has_base:
                try:
                    await self._rebase(core, pushes)  # the log does not need that checkpoint any longer
                except OSError as error:
                    log.warning("the log needs the checkpoint it began with", because=str(error))
            log.info("layout", shard=core.name, chunks=len(core.store.chunks) if core.store else 0)
        return answer

    async def _prepare(self, core: Shard, message: Assign, payload: bytes | memoryview) -> None:
        """What takes long: meanwhile the bulk thread takes rosters. Raises Refusal, and then nothing has changed."""
        if parse(message.compress).sparse:
            await asyncio.to_thread(compile_kernels)
        if message.checkpoint:
            await self.porter.bring(core, message, payload)

    async def _prepare_backup(self, core: Shard, message: Assign, payload: bytes | memoryview) -> None:
        """The same, asked for in the bulk thread."""
        preparing = asyncio.run_coroutine_threadsafe(self._prepare(core, message, payload), self.loop)
        await asyncio.wrap_future(preparing)
