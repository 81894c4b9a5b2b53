"""`zml ps`: the process around a shard. Control in the main loop, gradients and parameters in a thread of their own.

Rule: heartbeats never wait for an optimizer step, and the shard's state is touched by the bulk thread alone. Both
threads share Python's lock. Measured on two cores with a load of nine: the latest heartbeat came 0.13 s late while the
codec's kernels were compiled, and 0.6 s at the first Adam step on 100 million parameters. A lease is 1.5 s.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog
from msgspec import Struct

from .compression import parse
from .errors import FENCED, ZmlError
from .iothread import IoThread
from .layout import BadLayout, Registration
from .lease import COORDINATOR, Lease, join
from .link import LISTENER, bulk_endpoint, control_endpoint, listen
from .messages import Assign, Assignment, Fenced, Message, Ok, Pulse, Roster, Seat, Stop
from .scheduler.ids import JobId
from .shard import Reply, Shard
from .transport import Endpoint, Handler, Refusal

if TYPE_CHECKING:
    from .config import Settings

log = structlog.get_logger()
T = TypeVar("T")
InBulk = Callable[[Callable[[], T]], Awaitable[T]]  # run this where the shard lives


class Ps:
    """A shard's life as a member: join, take orders, end. `bulk` is called in the bulk thread."""

    def __init__(
        self,
        index: int,
        settings: Settings,
        control: Callable[..., Endpoint],
        in_bulk: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> None:
        self.name = f"p{index}"
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
            self.core = Shard(JobId(self.lease.joined.job), self.name)
            keeping = asyncio.ensure_future(self.lease.keep())
            keeping.add_done_callback(lambda task: None if task.cancelled() else self.finish(task.result()))
            return await self.over
        finally:
            if keeping is not None:
                keeping.cancel()
            await self.endpoint.close()

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
            case Assign():
                return self._assign(message, bytes(payload or b""))
            case Roster():
                return self._roster(message, bytes(payload or b""))
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

    async def _assign(self, message: Assign, payload: bytes) -> Message:
        try:
            assignment = msgspec.msgpack.decode(payload, type=Assignment)
            registration = Registration.from_bytes(assignment.registration)
        except (msgspec.MsgspecError, BadLayout) as bad:
            raise Refusal("layout", f"the layout cannot be used: {bad}") from None
        core = self._core()
        if parse(message.compress).sparse:
            await asyncio.to_thread(compile_kernels)  # meanwhile the bulk thread takes rosters
        await self.in_bulk(
            lambda: core.assign(registration, assignment.placement, message.staleness, message.compress)
        )
        log.info("layout", shard=self.name, chunks=len(core.store.chunks) if core.store else 0)
        return Ok()

    async def _roster(self, message: Roster, payload: bytes) -> Message:
        try:
            seats = msgspec.msgpack.decode(payload, type=list[Seat])
        except msgspec.MsgspecError as bad:
            raise Refusal("roster", f"the roster cannot be read: {bad}") from None
        core = self._core()
        await self.in_bulk(lambda: core.roster(message.generation, seats))
        return Ok()

    def _core(self) -> Shard:
        if self.core is None:
            raise Refusal("early", f"{self.name} has not joined yet")
        return self.core


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

        async def in_bulk(function: Callable[[], None]) -> None:
            await asyncio.wrap_future(thread.submit(_called(function)))

        def control(name: str, handler: Handler) -> Endpoint:
            return control_endpoint(settings, name, handler, keys=(f"p{shard}", LISTENER))

        ps = Ps(shard, settings, control, in_bulk)
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


async def _called(function: Callable[[], None]) -> None:
    function()
