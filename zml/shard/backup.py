"""A backup: another shard's copy, fed in this process with what that one takes, ready to serve in its place.

Pieces come numbered (`mirror` sends them). One is answered when it and all before it are here, and done after that, in
their order: the shard that waits for the answer does not wait for the optimizer of its copy. A backup has a push log of
its own, under a name that no other copy has: promoted, it is a shard like any other, and no folder ever holds two
histories.

Rule: what cannot be done breaks the backup, and a broken backup takes nothing more and never serves.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import structlog
from torch import Tensor

from ..errors import ZmlError
from ..messages import AnyMessage, Assign, Copy, Message, Ok, Published
from ..scheduler.homes import copy_name
from ..scheduler.ids import JobId
from ..transport import Refusal
from . import base
from .pushlog import LENGTH, NoLog, PushLog
from .shard import Shard

EARLY_MOST = 512  # pieces that have overtaken others
BACKLOG_BYTES = 64 << 20  # of pieces that are here and not done: beyond it answers wait

log = structlog.get_logger()
# Compile what a sparse job needs, outside of this thread.
Prepare = Callable[[Shard, Assign, bytes | memoryview], Awaitable[None]]


class Backup:
    """One copy of one shard. In the bulk thread."""

    def __init__(
        self,
        message: Copy,
        folder: Callable[[str], Path | None],
        prepare: Prepare,
        based: Callable[[Shard, PushLog], None] = lambda core, pushes: None,
    ) -> None:
        """`folder` tells where the push log of that name is to be; `based` is called once it can be read."""
        self.name = copy_name(message.shard, message.home, message.copy)
        self.age = (message.home, message.copy)
        self.core = Shard(JobId(message.job), message.shard)
        self.folder = folder(self.name)
        self.prepare = prepare
        self.based = based
        self.pushes: PushLog | None = None
        self.whole = False  # the state has come; from now on messages
        self.broken = ""
        self.closed = False
        self.next = 0  # the number of the next piece without a gap
        self.early: dict[int, tuple[Copy, memoryview, asyncio.Future[Message]]] = {}
        self.backlog: deque[tuple[Copy, memoryview]] = deque()
        self.backlog_bytes = 0
        self.held: deque[asyncio.Future[Message]] = deque()  # answers that wait for a shorter backlog
        self.parts: list[memoryview] = []  # of a payload whose end is still to come
        self.part_head = b""
        self.account: base.Account | None = None
        self.tensors: dict[str, Tensor] = {}
        self.work: asyncio.Task[None] | None = None
        self.decoder = msgspec.msgpack.Decoder(AnyMessage | Published)

    def take(self, message: Copy, payload: memoryview | None) -> Message | Awaitable[Message]:
        """One piece."""
        if self.closed or self.broken:
            raise Refusal("broken", self.broken or f"copy {self.name} takes nothing more")
        data = payload if payload is not None else memoryview(b"")
        if message.number < self.next:
            return Ok()
        if message.number != self.next:
            if len(self.early) >= EARLY_MOST or message.number in self.early:
                raise Refusal("ahead", f"piece {message.number} came, and {self.next} was to follow")
            future = asyncio.get_running_loop().create_future()
            self.early[message.number] = (message, data, future)
            return future
        self._here(message, data)
        while (found := self.early.pop(self.next, None)) is not None:
            later, data, future = found
            self._here(later, data)
            self._answer(future)
        if self.backlog_bytes > BACKLOG_BYTES:
            future = asyncio.get_running_loop().create_future()
            self.held.append(future)
            return future
        return Ok()

    async def serve(self) -> Shard:
        """Take nothing more, do what is here, and be the shard. Raises Refusal where it cannot."""
        if self.closed:
            raise Refusal("stale", f"copy {self.name} was given up")
        self.closed = True
        while self.work is not None and not self.work.done():
            await asyncio.wait([self.work])
        self._fail_all("it serves now")
        if self.broken or not self.whole:
            raise Refusal("broken", self.broken or f"copy {self.name} is not complete")
        return self.core

    def drop(self) -> None:
        """Another copy takes its place: what this one has written is of no use any more."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        self.closed = True
        if self.work is not None:
            self.work.cancel()
        self._fail_all(f"copy {self.name} was given up")
        if self.pushes is not None:
            self.core.log = NoLog()
            self.pushes.close()
            self.pushes = None

    # -- pieces ------------------------------------------------------------------------------------------

    def _here(self, message: Copy, data: memoryview) -> None:
        self.next += 1
        self.backlog.append((message, data))
        self.backlog_bytes += len(data)
        if self.work is None or self.work.done():
            self.work = asyncio.ensure_future(self._work())

    def _answer(self, future: asyncio.Future[Message]) -> None:
        if not future.done():
            if self.backlog_bytes > BACKLOG_BYTES:
                self.held.append(future)
            else:
                future.set_result(Ok())

    async def _work(self) -> None:
        """Do what is here."""
        try:
            while self.backlog:
                message, data = self.backlog.popleft()
                await self._do(message, data)
                self.backlog_bytes -= len(data)
                while self.held and self.backlog_bytes <= BACKLOG_BYTES:
                    self._answer(self.held.popleft())
                await asyncio.sleep(0)  # others have a turn
        except Exception as error:
            log.error("backup broken", shard=self.core.name, copy=self.name, because=repr(error))
            self.broken = f"copy {self.name} is broken: {error}"
            self.backlog.clear()
            self._fail_all(self.broken)

    async def _do(self, message: Copy, data: memoryview) -> None:
        if not self.parts:
            self.part_head = message.head
        if self.parts or message.more:
            self.parts.append(data)
            if message.more:
                return
            data, self.parts = memoryview(b"".join(self.parts)), []
        head = self.part_head
        if not head and message.kind in ("tensor", "message"):
            end = LENGTH.size + LENGTH.unpack_from(data)[0]
            head, data = bytes(data[LENGTH.size : end]), data[end:]
        match message.kind:
            case "account":
                self.account = msgspec.msgpack.decode(data, type=base.Account)
            case "tensor":
                name, tensor = base.unpacked(head, data)
                self.tensors[name] = tensor
            case "end":
                await self._begin()
            case "message":
                await self._follow(self.decoder.decode(head), data)

    async def _begin(self) -> None:
        """The state is here."""
        if self.account is None:
            raise Refusal("frame", "a copy without its account")
        state = base.State(self.account, self.tensors)
        if (assign := state.account.assign) is not None:  # whatever it began with is in the state
            await self.prepare(self.core, msgspec.structs.replace(assign, checkpoint=""), b"")
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.core.log = self.pushes = PushLog(self.folder)
            except ZmlError as held:
                raise Refusal("log", held.what) from None
            await asyncio.to_thread(self.pushes.rebase, self.pushes.cut(), state)
            self.based(self.core, self.pushes)
        base.become(self.core, state)
        self.account, self.tensors, self.whole = None, {}, True

    async def _follow(self, message: Message, payload: memoryview) -> None:
        if not self.whole:
            raise Refusal("frame", "a message before the state")
        if isinstance(message, Assign):
            if message.checkpoint:  # to fetch it takes long, and meanwhile the copy would count as in step
                raise Refusal("frame", "a shard that begins with a checkpoint is copied anew")
            await self.prepare(self.core, message, payload)
        self.core.log.append(message, payload)
        self.core.replay(message, payload)

    def _fail_all(self, because: str) -> None:
        waiting = [future for _, _, future in self.early.values()] + list(self.held)
        self.early.clear()
        self.held.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(Refusal("broken", because))
