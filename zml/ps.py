"""`zml ps`: the process around a shard. Control in the main loop, gradients and parameters in a thread of their own.

Rules: heartbeats never wait for an optimizer step, and the shard's state is touched by the bulk thread alone. What a
former process of the same shard has left in the push log is read before anything is served. Both threads share
Python's lock. Measured on two cores with a load of nine: the latest heartbeat came 0.13 s late while the codec's
kernels were compiled, and 0.6 s at the first Adam step on 100 million parameters. A lease is 1.5 s.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from msgspec import Struct

from .base import state_of
from .compression import parse
from .errors import FENCED, LOG_DAMAGED, LOST, ZmlError
from .iothread import IoThread
from .lease import COORDINATOR, Lease, ask, join
from .link import LISTENER, bulk_endpoint, control_endpoint, listen
from .messages import (
    Align,
    Assign,
    Copy,
    Fenced,
    Hold,
    Message,
    Ok,
    Pulse,
    Release,
    Returned,
    Roster,
    Settle,
    Stop,
    Write,
    Written,
)
from .pushlog import PushLog
from .records import Damaged
from .rundir import shard_state
from .scheduler.ids import JobId
from .shard import Reply, Shard
from .transport import Endpoint, Handler, Refusal, TransportError

if TYPE_CHECKING:
    from .config import Settings

SYNC_S = 1.0  # what was pushed longer ago survives the machine

log = structlog.get_logger()
InBulk = Callable[[Callable[[], Any]], Awaitable[Any]]  # run this where the shard lives


class Ps:
    """A shard's life as a member: join, read what a former self has left, take orders, end.

    `bulk` is called in the bulk thread. `state` is the folder of the push log, for a run directory that the coordinator
    has named; None for a shard whose state may die with it.
    """

    def __init__(
        self,
        index: int,
        settings: Settings,
        control: Callable[..., Endpoint],
        in_bulk: InBulk,
        state: Callable[[str], Path | None] = lambda run_dir: None,
    ) -> None:
        self.name = f"p{index}"
        self.state = state
        self.pushes: PushLog | None = None
        self.syncing: asyncio.Task[None] | None = None
        self.settings = settings
        self.in_bulk = in_bulk
        self.core: Shard | None = None
        self.lease: Lease | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.over: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # A name for this process alone: a second one that wants to be the same shard is told apart.
        self.endpoint = control(f"{self.name}-{socket.gethostname()}-{os.getpid()}", self.handle)

    async def run(self, addresses: list[str]) -> int:
        """Join and serve until the job is over; returns the exit code."""
        await self.endpoint.start()
        keeping: asyncio.Task[ZmlError] | None = None
        try:
            self.lease = await join(self.endpoint, self.settings, "shard", self.name, addresses=addresses)
            keeping = asyncio.ensure_future(self.lease.keep())
            keeping.add_done_callback(lambda task: None if task.cancelled() else self.finish(task.result()))
            await self._return(self.lease)
            return await self.over
        finally:
            for task in (keeping, self.syncing):
                if task is not None:
                    task.cancel()
            await self.endpoint.close()
            if self.pushes is not None:
                self.pushes.close()

    async def _return(self, lease: Lease) -> None:
        """Become what the log says, and tell the coordinator."""
        folder = self.state(lease.joined.run_dir)
        core = Shard(JobId(lease.joined.job), self.name)
        if folder is not None:
            began = time.monotonic()
            try:
                core.log = self.pushes = pushes = PushLog(folder)
                count = await self.in_bulk(lambda: core.recover(pushes))
            except Damaged as bad:
                fix = "Remove that folder only if the run may begin anew; nobody else has what is in it."
                raise ZmlError(LOG_DAMAGED, f"{self.name}: {bad}", fix) from None
            except OSError as error:
                raise ZmlError(
                    LOG_DAMAGED, f"{self.name} cannot use its push log in {folder}: {error}"
                ) from None
            if count or pushes.records.torn_bytes:
                log.info(
                    "push log read",
                    shard=self.name,
                    messages=count,
                    torn_bytes=pushes.records.torn_bytes,
                    seconds=round(time.monotonic() - began, 3),
                )
            self.syncing = asyncio.ensure_future(self._sync(core, pushes))
        self.core = core
        joined = lease.joined
        here = Returned(joined.job, joined.member, joined.incarnation, core.layout_digest)
        try:
            await ask(self.endpoint, here, within_s=self.settings.coordinator_away_s)
        except TransportError as error:
            raise ZmlError(
                LOST, f"{self.name}: the coordinator was not told that it is here: {error}"
            ) from None

    async def _sync(self, core: Shard, pushes: PushLog) -> None:
        """Let what was pushed survive the machine, and cut the log where it has become long. A disk that cannot is told
        of, once."""
        told = False
        while True:
            await asyncio.sleep(SYNC_S)
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
        """Ctrl-C or SIGTERM: the shard says goodbye and ends; without a replica its job cannot go on."""
        if self.lease is None or self.leaving is not None:
            self.finish(130)
        else:
            self.leaving = asyncio.ensure_future(self._leave(self.lease, because, 130))

    async def _leave(self, lease: Lease, because: str, code: int) -> None:
        await lease.leave(because)
        self.finish(code)

    async def _rebase(self, core: Shard, pushes: PushLog) -> None:
        """The shard goes on as soon as it is copied; the copy is written beside it."""
        began = time.monotonic()
        number, state = await self.in_bulk(lambda: (pushes.cut(), state_of(core)))
        copied_s = time.monotonic() - began
        await asyncio.to_thread(pushes.rebase, number, state)
        log.info(
            "push log cut",
            shard=self.name,
            bytes=state.bytes,
            copied_s=round(copied_s, 4),
            seconds=round(time.monotonic() - began, 3),
        )

    # -- messages ------------------------------------------------------------------------------------

    def bulk(self, peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
        """From a worker; in the bulk thread."""
        if self.core is None:
            raise Refusal("early", f"{self.name} has not joined yet")
        return self.core.handle(peer, message, payload)

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
            case Assign() | Roster() | Settle() | Hold() | Align() | Copy() | Release():
                return self._order(message, bytes(payload or b""))
            case Write():
                return self._write(message)
            case Stop():
                if self.lease is not None and self.leaving is None:
                    self.leaving = asyncio.ensure_future(self._leave(self.lease, message.because, 0))
                return Ok()
            case Fenced():
                if self.lease is not None and self.lease.is_mine(message) and self.leaving is None:
                    who = f"{message.member}#{message.incarnation}"
                    self.finish(ZmlError(FENCED, f"{who} was fenced: {message.because}"))
                return None
        raise Refusal("unexpected", f"a shard does not take {type(message).__name__}")

    async def _write(self, message: Write) -> Message:
        """Write the newest copy, beside the training."""
        from .checkpoint import shard_metadata, write_shard_file

        copy = self.core.copy if self.core is not None else None
        if copy is None or copy[0] != message.checkpoint:
            raise Refusal("checkpoint", f"{self.name} has no copy for checkpoint {message.checkpoint}")
        if not Path(message.folder).is_dir():
            raise Refusal("checkpoint", f"{message.folder} cannot be seen from {self.name}'s machine")
        _, versions, tensors = copy
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        metadata = shard_metadata({index: version for index, (version, _, _) in versions.items()})
        try:
            written = await asyncio.to_thread(
                write_shard_file, Path(message.folder, message.name), arrays, metadata
            )
        except ZmlError as error:
            raise Refusal("checkpoint", str(error)) from None
        return Written(written.bytes, written.xxh3)

    async def _order(
        self, message: Assign | Roster | Settle | Hold | Align | Copy | Release, payload: bytes
    ) -> Any:
        core = self.core
        if core is None:
            raise Refusal("early", f"{self.name} has not read its log yet")
        if isinstance(message, Assign) and parse(message.compress).sparse:
            await asyncio.to_thread(compile_kernels)  # meanwhile the bulk thread takes rosters
        answer = await self.in_bulk(lambda: core.order(message, payload))
        if isinstance(message, Assign):
            if message.checkpoint and self.pushes is not None and self.pushes.bytes:
                await self._rebase(core, self.pushes)  # the log does not need that checkpoint any longer
            log.info("layout", shard=self.name, chunks=len(core.store.chunks) if core.store else 0)
        return answer


NOTICE = "zml: "  # how a line begins that a launcher is to show


def serve(settings: Settings, shard: int) -> int:
    """Run a shard until its job is over. Raises ZmlError for a person to read."""
    import torch
    import uvloop

    torch.set_num_threads(1)  # chunks are small; the other cores belong to workers and other shards
    if parse(settings.compress).sparse:
        compile_kernels()
    return uvloop.run(_serve(settings, shard))


def compile_kernels() -> None:
    """Or load them, where they were compiled before."""
    from .codec import kernels

    def say(text: str) -> None:
        print(f"{NOTICE}{text}", file=sys.stderr, flush=True)

    for module in (kernels.ENTRY, *kernels.ON_SHARDS):
        kernels.prepare(say, module)


async def _serve(settings: Settings, shard: int) -> int:
    loop = asyncio.get_running_loop()
    thread = IoThread("zml-bulk")
    try:

        async def in_bulk(function: Callable[[], Any]) -> Any:
            return await asyncio.wrap_future(thread.submit(_called(function)))

        def state(run_dir: str) -> Path | None:
            if settings.push_log == "off":
                return None
            return shard_state(settings.run_dir or run_dir, shard)

        def control(name: str, handler: Handler) -> Endpoint:
            return control_endpoint(settings, name, handler, keys=(f"p{shard}", LISTENER))

        ps = Ps(shard, settings, control, in_bulk, state)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ps.leave, signal.Signals(number).name)
        listener = await asyncio.wrap_future(thread.submit(_listen(settings, ps)))
        try:
            return await ps.run(list(listener.addresses))
        finally:
            await asyncio.wrap_future(thread.submit(listener.close()))
    finally:
        thread.close()


async def _listen(settings: Settings, ps: Ps) -> Endpoint:
    listener = bulk_endpoint(settings, ps.name, ps.bulk)
    await listen(listener)
    return listener


async def _called(function: Callable[[], Any]) -> Any:
    return function()
