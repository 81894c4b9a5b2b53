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
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct

from .backup import Backup
from .base import state_of
from .begin import CannotBegin, Sees
from .checkpoint.folder import is_seen
from .compiled import compile_kernels
from .compression import parse
from .errors import BAD_CHECKPOINT, FENCED, LOG_DAMAGED, LOST, ZmlError
from .lease import COORDINATOR, Lease, ask, join
from .messages import (
    Adopt,
    Align,
    Assign,
    Copy,
    Fenced,
    Hold,
    Message,
    Ok,
    Pair,
    Promote,
    Pulse,
    Release,
    Returned,
    Roster,
    Settle,
    Snap,
    Standing,
    Stop,
    Vacate,
    Vacated,
    Wait,
    Write,
)
from .mirror import Mirror
from .porter import Porter
from .pushlog import NoLog, PushLog
from .records import Damaged
from .scheduler.ids import JobId
from .shard import Reply, Shard
from .transport import Endpoint, Handler, Refusal, Refused, TransportError

if TYPE_CHECKING:
    from .config import Settings

SYNC_S = 1.0  # what was pushed longer ago survives the machine
STANDING_S = 5.0  # for the coordinator to answer; it is asked again then
EX_TEMPFAIL = 75  # of a process that has handed over what it had: safe to run again
INTERRUPTED = 130
AGAIN_S = 0.1  # until the coordinator is asked again

log = structlog.get_logger()
InBulk = Callable[[Callable[[], Any]], Awaitable[Any]]  # run this where the shard lives; await it there, too


class Ps:
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
        self.cores: dict[str, Shard] = {}  # the shards that live here
        self.homes: dict[str, int] = {}  # which of its homes this is, of each shard that is to live here
        self.logs: dict[str, PushLog] = {}
        self.listeners: dict[str, Endpoint] = {}  # of the shards that have not this process' name
        self.backups: dict[str, Backup] = {}  # in the bulk thread alone
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop = asyncio.get_running_loop()
        self.lease: Lease | None = None
        self.vacating: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.over: asyncio.Future[int] = self.loop.create_future()
        # A name for this process alone: a second one that wants to be the same shard is told apart.
        self.endpoint = control(f"{self.name}-{socket.gethostname()}-{os.getpid()}", self.handle)
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
            self.lease = await join(self.endpoint, self.settings, "shard", self.name, addresses=addresses)
            self.porter.lease = self.lease
            keeping = asyncio.ensure_future(self.lease.keep())
            keeping.add_done_callback(lambda task: None if task.cancelled() else self.finish(task.result()))
            serves = self.lease.joined.serves
            self.homes = {shard: incarnation for shard, incarnation, _ in serves}
            for shard, _, name in serves:
                await self._recover(self.lease, shard, name)
            return await self.over
        finally:
            for task in (keeping, self.vacating, *self.tasks):
                if task is not None:
                    task.cancel()
            await self.in_bulk(self._end_bulk)
            await self.endpoint.close()
            for pushes in self.logs.values():
                pushes.close()

    def die(self) -> None:
        """End without a word, as a process that is killed: for tests, where several live in one."""
        for task in self.tasks:
            task.cancel()
        for core in self.cores.values():
            if core.mirror is not None:
                core.mirror.close()
        for backup in self.backups.values():
            backup.close()
        for pushes in self.logs.values():
            pushes.close()

    async def _end_bulk(self) -> None:
        for core in self.cores.values():
            if core.mirror is not None:
                core.mirror.close()
        for backup in self.backups.values():
            backup.close()
        for listener in self.listeners.values():
            await listener.close()

    def _log_folder(self, lease: Lease, name: str) -> Path | None:
        own = self.state(lease.joined.run_dir)
        return own.with_name(name) if own is not None else None

    async def _recover(self, lease: Lease, shard: str, name: str) -> None:
        """Become what the log says, and tell the coordinator."""
        core = await self._read(self._log_folder(lease, name), lease.joined.job, shard)
        await self._live_here(core)
        try:
            await self._return(lease, core)
        except TransportError as error:
            raise ZmlError(
                LOST, f"{core.name}: the coordinator was not told that it is here: {error}"
            ) from None

    async def _read(self, folder: Path | None, job: str, shard: str) -> Shard:
        """A shard as its log has it, which it goes on to write."""
        core = Shard(JobId(job), shard)
        core.sees = self.porter.sees
        if folder is not None:
            began = time.monotonic()
            try:
                core.log = self.logs[shard] = pushes = PushLog(folder)
                try:
                    count = await self.in_bulk(lambda: core.recover(pushes))
                except CannotBegin as lacks:  # nothing but rosters comes before, and twice they are the same
                    await self.porter.bring(core, lacks.assign, lacks.payload)
                    count = await self.in_bulk(lambda: core.recover(pushes))
            except Refusal as refusal:
                raise ZmlError(BAD_CHECKPOINT, f"{core.name} cannot go on: {refusal.because}") from None
            except Damaged as bad:
                fix = "Remove that folder only if the run may begin anew; nobody else has what is in it."
                raise ZmlError(LOG_DAMAGED, f"{core.name}: {bad}", fix) from None
            except OSError as error:
                raise ZmlError(
                    LOG_DAMAGED, f"{core.name} cannot use its push log in {folder}: {error}"
                ) from None
            if count or pushes.records.torn_bytes:
                log.info(
                    "push log read",
                    shard=core.name,
                    messages=count,
                    torn_bytes=pushes.records.torn_bytes,
                    seconds=round(time.monotonic() - began, 3),
                )
            self._spawn(self._sync(core, pushes))
        return core

    async def _live_here(self, core: Shard) -> None:
        """From now on this process takes pushes for this shard."""
        name = core.name
        if name not in (self.name, *self.listeners):
            if self.listen is None:
                raise Refusal("placement", f"{self.name} cannot listen as {name}")

            def bulk(peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
                return self._living(name).handle(peer, message, payload)

            self.listeners[name] = await self.listen(name, bulk)
        self.cores[name] = core

    def _living(self, shard: str) -> Shard:
        """A shard that takes pushes here. Raises Refusal; in the bulk thread."""
        core = self.cores.get(shard)
        if core is None and shard not in self.homes:
            raise Refusal("moved", f"{shard} lives in another process")
        if core is None:
            raise Refusal("early", f"{self.name} has not read the log of {shard} yet")
        return core

    async def _moved_away(self, shard: str, home: int) -> None:
        """It is another process' from now on: forget it. The log stays, until that one has said that it serves."""
        if self.homes.get(shard) != home:
            return
        del self.homes[shard]
        core, pushes = self.cores.pop(shard, None), self.logs.pop(shard, None)

        def close() -> None:
            if core is not None:
                core.log = NoLog()
            if pushes is not None:
                pushes.close()

        await self.in_bulk(close)
        log.warning("lives elsewhere", shard=shard)

    async def _return(self, lease: Lease, core: Shard) -> None:
        joined, listener = lease.joined, self.listeners.get(core.name)
        addresses = list(listener.addresses) if listener is not None else []
        here = Returned(
            joined.job, joined.member, joined.incarnation, core.layout_digest, core.name, addresses
        )
        await ask(self.endpoint, here, within_s=self.settings.coordinator_away_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _sync(self, core: Shard, pushes: PushLog) -> None:
        """Let what was pushed survive the machine, and cut the log where it has become long. A disk that cannot is told
        of, once."""
        told = False
        while True:
            await asyncio.sleep(SYNC_S)
            if core.log is not pushes:
                return  # a backup that was given up
            try:
                await asyncio.to_thread(pushes.records.sync)
                if core.store is not None and pushes.is_long(core.store.state_bytes):
                    await self._rebase(core, pushes)
                told = False
            except OSError as error:
                if not told:
                    log.error("the push log is not safe from a crash of the machine", because=str(error))
                told = True

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
            self.finish(INTERRUPTED)
        elif self.vacating is None:
            self.vacating = asyncio.ensure_future(self._vacate(self.lease, because))
        else:
            self.vacating.cancel()
            self.leaving = asyncio.ensure_future(self._leave(self.lease, because, INTERRUPTED))

    async def _vacate(self, lease: Lease, because: str) -> None:
        handed_over = await self._hand_over(lease, because)
        code = EX_TEMPFAIL if handed_over and because != "SIGINT" else INTERRUPTED
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
            for core in self.cores.values():
                if core.mirror is not None:
                    core.mirror.let_go()

        if self.vacating is not None:
            self.vacating.cancel()
        await self.in_bulk(let_go)
        await self._leave(lease, because, 0)

    async def _rebase(self, core: Shard, pushes: PushLog) -> None:
        """The shard goes on as soon as it is copied; the copy is written beside it."""
        began = time.monotonic()
        number, state = await self.in_bulk(lambda: (pushes.cut(), state_of(core)))
        copied_s = time.monotonic() - began
        await asyncio.to_thread(pushes.rebase, number, state)
        log.info(
            "push log cut",
            shard=core.name,
            bytes=state.bytes,
            copied_s=round(copied_s, 4),
            seconds=round(time.monotonic() - began, 3),
        )

    # -- messages ------------------------------------------------------------------------------------

    def bulk(self, peer: str, message: Struct, payload: memoryview | None) -> Any:
        """From a worker, or from a shard that keeps its copy here; in the bulk thread."""
        if self.lease is None:
            raise Refusal("early", f"{self.name} has not joined yet")
        if isinstance(message, Copy):
            return self._copy(self.lease, message, payload)
        return self._living(self.name).handle(peer, message, payload)

    def handle(
        self, peer: str, message: Struct, payload: memoryview | None
    ) -> Message | Awaitable[Message] | None:
        """From the coordinator; in the main loop."""
        if peer != COORDINATOR:
            raise Refusal("unexpected", "a shard takes orders from the coordinator only")
        match message:
            case Pulse():
                if self.lease is not None:
                    self.lease.heard()
                return None
            case Assign() | Roster() | Settle() | Hold() | Align() | Snap() | Release():
                return self._order(message, bytes(payload or b""))
            case Write():
                return self.porter.write(self._core(message.shard), message)
            case Pair():
                return self._pair(message)
            case Promote():
                return self._promote(message)
            case Adopt():
                return self._adopt(message)
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
        self, message: Assign | Roster | Settle | Hold | Align | Snap | Release, payload: bytes
    ) -> Any:
        core = self._core(message.shard)
        if isinstance(message, Assign):
            await self._prepare(core, message, payload)
        answer = await self.in_bulk(lambda: core.covered(core.order(message, payload)))
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

    def _core(self, shard: str) -> Shard:
        core = self.cores.get(shard or self.name)
        if core is None:
            raise Refusal("early", f"{self.name} has not read the log of {shard or self.name} yet")
        return core

    # -- copies ------------------------------------------------------------------------------------------

    async def _pair(self, message: Pair) -> Message:
        """Keep a copy of a shard that lives here."""
        core, lease, dial = self._core(message.shard), self.lease, self.dial
        if lease is None or dial is None:
            raise Refusal("placement", f"{self.name} keeps no backups")
        joined = lease.joined

        def pair() -> None:
            if core.mirror is None:
                core.mirror = Mirror(
                    core, joined.member, joined.incarnation, message.incarnation, dial, self._report
                )
            core.mirror.pair(message)

        await self.in_bulk(pair)
        return Ok()

    def _report(self, standing: Standing) -> Awaitable[bool]:
        """How a shard and its backup stand, from the bulk thread to the coordinator."""
        return asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._tell(standing), self.loop))

    async def _tell(self, standing: Standing) -> bool:
        """Until the coordinator has answered. False: the shard lives elsewhere."""
        while True:
            try:
                await self.endpoint.request(COORDINATOR, standing, timeout_s=STANDING_S)
                return True
            except Refused as refused:
                if refused.code == "fenced":
                    await self._moved_away(standing.shard, standing.home)
                    return False
            except TransportError as error:
                log.warning("the coordinator does not answer", shard=standing.shard, because=str(error))
            await asyncio.sleep(AGAIN_S)

    def _copy(self, lease: Lease, message: Copy, payload: memoryview | None) -> Message | Awaitable[Message]:
        """A piece of a copy of a shard."""
        shard = message.shard
        if message.job != lease.joined.job:
            raise Refusal("job", f"{self.name} keeps no copies for job {message.job}")
        if shard not in (f"p{number}" for number in range(lease.spec.shards)):
            raise Refusal("placement", f"job {message.job} has no shard {shard[:20]!r}")
        if shard in self.cores or shard in self.homes:
            raise Refusal("fenced", f"{shard} lives in {self.name}")
        backup = self.backups.get(shard)
        if backup is None or backup.age < (message.home, message.copy):
            if backup is not None:
                backup.drop()
            backup = self.backups[shard] = Backup(
                message, lambda name: self._log_folder(lease, name), self._prepare_backup, self._based
            )
        elif backup.age > (message.home, message.copy):
            raise Refusal("fenced", f"{self.name} keeps a newer copy of {shard}")
        return backup.take(message, payload)

    def _based(self, core: Shard, pushes: PushLog) -> None:
        """A backup's log can be read from now on, and is to be kept short."""
        self.loop.call_soon_threadsafe(lambda: self._spawn(self._sync(core, pushes)))

    async def _promote(self, message: Promote) -> Message:
        """A backup is the shard from now on."""
        shard, lease = message.shard, self.lease
        if self.homes.get(shard) == message.incarnation:
            return Ok()
        backup = self.backups.get(shard)
        if lease is None or backup is None or backup.name != message.log:
            raise Refusal("stale", f"{self.name} has no copy {message.log}")
        self.homes[shard] = message.incarnation  # no copy is taken any more
        try:
            core = await self.in_bulk(backup.serve)
            await self._live_here(core)
        except (Refusal, ZmlError) as error:
            del self.homes[shard], self.backups[shard]
            await self.in_bulk(backup.drop)
            raise Refusal("placement", f"{self.name} cannot serve {shard}: {error}") from None
        del self.backups[shard]
        if backup.pushes is not None:
            self.logs[shard] = backup.pushes
        log.warning("promoted", shard=shard, incarnation=message.incarnation)
        self._spawn(self._return_promoted(lease, core))
        return Ok()

    async def _adopt(self, message: Adopt) -> Message:
        """The log of a process that is gone is read here, and the shard lives here from now on."""
        shard, lease = message.shard, self.lease
        if self.homes.get(shard) == message.incarnation:
            return Ok()
        folder = self._log_folder(lease, message.log) if lease is not None else None
        if lease is None or folder is None or shard in self.homes:
            raise Refusal("placement", f"{self.name} cannot read the log of {shard}")
        if not folder.is_dir():
            log.error("cannot be seen from here", shard=shard, folder=str(folder))
            raise Refusal("placement", f"{folder} cannot be seen from {self.name}")
        self.homes[shard] = message.incarnation
        try:
            core = await self._read(folder, lease.joined.job, shard)
            if not core.layout_digest:
                raise Refusal("placement", f"there are no parameters in {folder}")
            await self._live_here(core)
        except (Refusal, ZmlError) as error:
            log.error("cannot take a shard over", shard=shard, because=str(error))
            del self.homes[shard]
            if (pushes := self.logs.pop(shard, None)) is not None:
                pushes.close()
            raise Refusal("placement", f"{self.name} cannot serve {shard}: {error}") from None
        log.warning("taken over", shard=shard, incarnation=message.incarnation)
        self._spawn(self._return_promoted(lease, core))
        return Ok()

    async def _return_promoted(self, lease: Lease, core: Shard) -> None:
        try:
            await self._return(lease, core)
        except TransportError as error:
            self.finish(ZmlError(LOST, f"{core.name}: the coordinator was not told that it is here: {error}"))
