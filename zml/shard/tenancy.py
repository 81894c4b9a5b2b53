"""The shards that live in a process, and the copies of others that it keeps: how they come, and how they go.

A part of `ps`. A shard comes with the log of a former life, of this process or of one that is gone, or as a copy that
is promoted; it goes when another process serves it, and not before: until then its log and its memory are the shard,
and it says nothing (`mirror`). Rules: what the bulk thread works with is taken out of the tables there; a log is closed
only when its shard does not write to it any more.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct

from ..doctor.links import probed
from ..errors import BAD_CHECKPOINT, LOG_DAMAGED, LOST, ZmlError
from ..lease import COORDINATOR, Lease, ask
from ..messages import (
    Adopt,
    Assign,
    Cede,
    Copy,
    Graft,
    Message,
    Ok,
    Pair,
    Probe,
    Promote,
    Retire,
    Returned,
    Standing,
)
from ..records import MOST_BYTES, Damaged
from ..scheduler.ids import JobId, read_id
from ..tracing import emit, on
from ..tracing.shards import ShardTrace
from ..tracing.trees import single
from ..transport import Endpoint, Handler, Refusal, Refused, TransportError
from .backup import Backup
from .base import state_of
from .begin import CannotBegin
from .covering import covered
from .mirror import HEAD_BYTES, Mirror, pieces
from .porter import Porter
from .pulling import Reply
from .pushlog import NoLog, PushLog
from .shard import Shard

if TYPE_CHECKING:
    from ..config import Settings

SYNC_S = 1.0  # what was pushed longer ago survives the machine
STANDING_S = 5.0  # for the coordinator to answer; it is asked again then
REACH_S = 1.0  # for another shard to be reached, that buckets are given to: meanwhile training stands still
GIVE_S = 5.0  # and to take a piece of them
AGAIN_S = 0.1  # until the coordinator is asked again

log = structlog.get_logger()
InBulk = Callable[[Callable[[], Any]], Awaitable[Any]]  # run this where the shard lives; await it there, too


class Tenancy:
    """What `Ps` does with shards and copies."""

    name: str
    settings: Settings
    lease: Lease | None
    endpoint: Endpoint
    loop: asyncio.AbstractEventLoop
    porter: Porter
    in_bulk: InBulk
    state: Callable[[str], Path | None]
    listen: Callable[[str, Handler], Awaitable[Endpoint]] | None
    dial: Callable[[str], Endpoint] | None
    cores: dict[str, Shard]  # the shards that live here
    homes: dict[str, int]  # which of its homes this is, of each shard that is to live here
    logs: dict[str, PushLog]
    listeners: dict[str, Endpoint]  # of the shards that have not this process' name
    backups: dict[str, Backup]  # in the bulk thread alone
    grafts: dict[
        str, tuple[str, list[memoryview]]
    ]  # who cedes to a shard here, and what has come; in the bulk thread
    ceded: Iterator[int]
    taking: dict[str, tuple[int, asyncio.Task[Message]]]  # the newest order to serve each shard, by its home
    tasks: set[asyncio.Task[None]]

    def finish(self, result: int | ZmlError) -> None:
        raise NotImplementedError

    async def _prepare_backup(self, core: Shard, message: Assign, payload: bytes | memoryview) -> None:
        raise NotImplementedError

    # -- coming --------------------------------------------------------------------------------------------

    def _log_folder(self, lease: Lease, name: str) -> Path | None:
        own = self.state(lease.joined.run_dir)
        return own.with_name(name) if own is not None else None

    async def _recover(self, lease: Lease, shard: str, name: str) -> None:
        """Become what the log says, and tell the coordinator."""
        core = await self._read(self._log_folder(lease, name), lease.joined.job, shard)
        await self._live_here(core)
        await self._return(lease, core)

    async def _read(self, folder: Path | None, job: str, shard: str) -> Shard:
        """A shard as its log has it, which it goes on to write."""
        core = Shard(JobId(job), shard)
        core.sees = self.porter.sees
        if folder is not None:
            began, since = time.monotonic(), time.perf_counter()
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
                single("zml.recover", since, job=job, shard=core.name, messages=count)
            self._spawn(self._sync(core, pushes))
        return core

    async def _live_here(self, core: Shard) -> None:
        """From now on this process takes pushes for this shard."""
        name = core.name
        if name not in (self.name, *self.listeners):
            if self.listen is None:
                raise Refusal("placement", f"{self.name} cannot listen as {name}")

            def bulk(peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
                if isinstance(message, Probe):
                    return probed(message)
                return self._core(name).handle(peer, message, payload)

            self.listeners[name] = await self.listen(name, bulk)
        if on():  # and not before: what is replayed or copied was traced where it happened
            core.trace = ShardTrace(name, emit)
        self.cores[name] = core

    async def _return(self, lease: Lease, core: Shard) -> None:
        """Tell the coordinator that it is here. Raises ZmlError."""
        joined, listener = lease.joined, self.listeners.get(core.name)
        addresses = list(listener.addresses) if listener is not None else []
        here = Returned(
            joined.job, joined.member, joined.incarnation, core.layout_digest, core.name, addresses
        )
        try:
            await ask(self.endpoint, here, within_s=self.settings.coordinator_away_s)
        except TransportError as error:
            raise ZmlError(
                LOST, f"{core.name}: the coordinator was not told that it is here: {error}"
            ) from None

    # -- its log -------------------------------------------------------------------------------------------

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
                return  # it went elsewhere, or was a backup that was given up
            try:
                await asyncio.to_thread(pushes.records.sync)
                if core.store is not None and pushes.is_long(core.store.state_bytes):
                    await self._rebase(core, pushes)
                told = False
            except OSError as error:
                if not told and core.log is pushes:
                    log.error("the push log is not safe from a crash of the machine", because=str(error))
                told = True

    async def _rebase(self, core: Shard, pushes: PushLog) -> None:
        """The shard goes on; what it was is written beside it."""
        began = time.monotonic()
        cut = await self.in_bulk(lambda: (pushes.cut(), state_of(core)) if core.log is pushes else None)
        if cut is None:
            return
        number, state = cut
        size = await asyncio.to_thread(pushes.rebase, number, state)
        log.info("push log cut", shard=core.name, bytes=size, seconds=round(time.monotonic() - began, 3))

    def _core(self, shard: str) -> Shard:
        """A shard that takes orders and pushes here. In either thread; raises Refusal."""
        shard = shard or self.name
        core = self.cores.get(shard)
        if core is None and self.lease is not None and shard not in self.homes:
            raise Refusal("moved", f"{shard} lives in another process")
        if core is None:
            raise Refusal("early", f"{self.name} has not read the log of {shard} yet")
        return core

    # -- buckets that move ----------------------------------------------------------------------------------

    async def _cede(self, message: Cede, payload: bytes) -> Message:
        """A shard that lives here gives buckets to another, which has them when this is answered."""
        core, dial = self._core(message.shard), self.dial
        if dial is None:
            raise Refusal("placement", f"{self.name} reaches no other shard")
        _, parcel = await self.in_bulk(lambda: covered(core, core.order(message, payload)))
        name = f"{core.name}.{self.homes.get(core.name, 0)}.edition{message.edition}.{next(self.ceded)}"

        async def give() -> None:
            endpoint = dial(name)
            await endpoint.start()
            try:
                await endpoint.connect(message.to, message.addresses, timeout_s=REACH_S)
                for number, (_, part, more) in enumerate(pieces(b"", parcel)):
                    piece = Graft(message.job, message.to, message.edition, number, more)
                    await endpoint.request(message.to, piece, part, timeout_s=GIVE_S)
            except TransportError as error:
                log.warning("not ceded", shard=core.name, to=message.to, because=str(error))
                raise Refusal("placement", f"{message.to} did not take them: {error}") from None
            finally:
                await endpoint.close()

        await self.in_bulk(give)
        return Ok()

    def _graft(self, peer: str, message: Graft, payload: memoryview | None) -> Any:
        """A piece of what another shard cedes to one that lives here; in the bulk thread. Each attempt is a peer of its
        own, and the newest counts."""
        if self.lease is None or message.job != self.lease.joined.job:
            raise Refusal("job", f"{self.name} takes nothing in for job {message.job}")
        core, data = self._core(message.shard), payload if payload is not None else memoryview(b"")
        if message.number == 0:
            self.grafts[core.name] = (peer, [])
        who, came = self.grafts.get(core.name, ("", []))
        if who != peer or message.number != len(came):
            raise Refusal("frame", f"piece {message.number} of {peer} does not follow what has come")
        if sum(map(len, came)) + len(data) > MOST_BYTES - HEAD_BYTES:
            raise Refusal("frame", f"{peer} sends more than can be taken in at once")
        came.append(data)
        if message.more:
            return Ok()
        del self.grafts[core.name]
        return self._grafted(core, Graft(message.job, core.name, message.edition), b"".join(came))

    async def _grafted(self, core: Shard, message: Graft, whole: bytes) -> Any:
        """It is safe from a crash of the machine before the other may let go of it."""
        answer = covered(core, core.order(message, whole))
        if (pushes := self.logs.get(core.name)) is not None:
            await asyncio.to_thread(pushes.records.sync)
        return await answer if isinstance(answer, Awaitable) else answer

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
                    log.warning("lives elsewhere", shard=standing.shard)
                    return False  # its memory and its log stay, until that one serves
            except TransportError as error:
                log.warning("the coordinator does not answer", shard=standing.shard, because=str(error))
            await asyncio.sleep(AGAIN_S)

    def _copy(self, lease: Lease, message: Copy, payload: memoryview | None) -> Message | Awaitable[Message]:
        """A piece of a copy of a shard."""
        shard = message.shard
        if message.job != lease.joined.job:
            raise Refusal("job", f"{self.name} keeps no copies for job {message.job}")
        if (named := read_id(shard)) is None or named.role != "shard":
            raise Refusal("placement", f"{shard[:20]!r} names no shard")
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

    def _take_over(self, message: Promote | Adopt) -> Awaitable[Message]:
        """Serve a shard. The same order once more waits for the same end."""
        home, task = self.taking.get(message.shard, (0, None))
        if task is None or home != message.incarnation:
            taking = self._promote(message) if isinstance(message, Promote) else self._adopt(message)
            task = asyncio.ensure_future(taking)
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self.taking[message.shard] = (message.incarnation, task)
        return asyncio.shield(task)

    async def _promote(self, message: Promote) -> Message:
        """A backup is the shard from now on."""
        shard, lease = message.shard, self.lease

        def found() -> Backup | None:
            backup = self.backups.get(shard)
            if backup is None or backup.name != message.log or shard in self.homes:
                return None
            self.homes[shard] = message.incarnation  # no copy is taken any more
            del self.backups[shard]
            return backup

        backup = await self.in_bulk(found)
        if lease is None or backup is None:
            raise Refusal("stale", f"{self.name} has no copy {message.log}")
        try:
            core = await self.in_bulk(backup.serve)
            await self._live_here(core)
        except (Refusal, ZmlError) as error:
            del self.homes[shard]
            await self.in_bulk(backup.drop)
            raise Refusal("placement", f"{self.name} cannot serve {shard}: {error}") from None
        if backup.pushes is not None:
            self.logs[shard] = backup.pushes
        log.warning("promoted", shard=shard, incarnation=message.incarnation)
        self._spawn(self._return_soon(lease, core))
        return Ok()

    async def _adopt(self, message: Adopt) -> Message:
        """The log of a former home is read here, and the shard lives here from now on. Where this was that home, and
        what was to take its place did not, it goes on with what it has."""
        shard, lease = message.shard, self.lease
        if lease is None:
            raise Refusal("early", f"{self.name} has not joined yet")
        if (core := self.cores.get(shard)) is not None:
            former = core
            await self.in_bulk(lambda: let_go(former))
        else:
            core = await self._read_for(lease, message)
        self.homes[shard] = message.incarnation
        log.warning("taken over", shard=shard, incarnation=message.incarnation)
        self._spawn(self._return_soon(lease, core))
        return Ok()

    async def _read_for(self, lease: Lease, message: Adopt) -> Shard:
        shard, folder = message.shard, self._log_folder(lease, message.log)
        unread = not message.empty and (folder is None or not folder.is_dir())
        if unread or shard in self.homes:
            log.error("cannot be taken over", shard=shard, folder=str(folder))
            raise Refusal("placement", f"{self.name} cannot read the log of {shard}")
        self.homes[shard] = message.incarnation
        core: Shard | None = None
        try:
            core = await self._read(folder, lease.joined.job, shard)
            if not core.layout_digest and not message.empty:
                raise Refusal("placement", f"there are no parameters in {folder}")
            await self._live_here(core)
        except (Refusal, ZmlError) as error:
            log.error("cannot be taken over", shard=shard, because=str(error))
            await self._close(shard, core)
            raise Refusal("placement", f"{self.name} cannot serve {shard}: {error}") from None
        return core

    async def _return_soon(self, lease: Lease, core: Shard) -> None:
        try:
            await self._return(lease, core)
        except ZmlError as error:
            self.finish(error)

    # -- going ---------------------------------------------------------------------------------------------

    async def _retire(self, message: Retire) -> Message:
        """The shard serves elsewhere, with all that it had here."""
        shard, home = message.shard, message.incarnation

        def drop() -> None:
            backup = self.backups.get(shard)
            if backup is not None and backup.age < (home, message.copy):
                del self.backups[shard]
                backup.drop()

        await self.in_bulk(drop)
        if self.homes.get(shard, home) < home:
            pushes = self.logs.get(shard)
            await self._close(shard, self.cores.get(shard))
            if pushes is not None:
                await asyncio.to_thread(shutil.rmtree, pushes.folder, ignore_errors=True)
        return Ok()

    async def _close(self, shard: str, core: Shard | None) -> None:
        """Nothing of it is here any more but the log on the disk."""
        self.homes.pop(shard, None)
        self.cores.pop(shard, None)
        pushes = self.logs.pop(shard, None)

        def close() -> None:
            if core is not None:
                core.end()
                let_go(core)
                core.log = NoLog()
            if pushes is not None:
                pushes.close()

        await self.in_bulk(close)

    def _end_of_all(self) -> None:
        """Of the process; in the bulk thread."""
        for core in list(self.cores.values()):
            if core.mirror is not None:
                core.mirror.close()
        for backup in list(self.backups.values()):
            backup.close()


def let_go(core: Shard) -> None:
    """A mirror that kept a copy of this life."""
    if core.mirror is not None:
        core.mirror.close()
    core.mirror = None
