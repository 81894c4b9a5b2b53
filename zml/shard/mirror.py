"""A shard keeps a copy of itself in another process, as its backup or to move there: its state once, then every message
it takes, in their order.

What comes is forwarded as it came, many messages at a time under way; a shard is a function of them (`pushlog`), so the
backup has the same bits. Rule: nothing that the shard says - an acknowledgement, where a worker stands, parameters -
leaves before the backup has every message it follows from. Parameters too: a version that a worker has seen and the
backup has not could be made once more after a promotion, from the same steps in another order or cut at another place,
and then two workers would hold different bits under one number.

A backup that falls silent is given up, but first the coordinator must agree, which then will not promote it. Until it
has, nothing is acknowledged: without its backup's word or the coordinator's leave a shard cannot say anything, and so
one that was declared dead and does not know it changes nothing (`ps` asks, `scheduler.homes` decides). While a copy is
being made the shard answers for itself alone.

In the bulk thread, as the shard.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..messages import Assign, Copy, Message, Pair, Standing
from ..records import Buffer
from ..transport import Endpoint, Refusal, TransportError
from . import base
from .base import state_of
from .pushlog import LENGTH
from .snapshot import Snapshot

if TYPE_CHECKING:
    from .shard import Shard

SLOW_S = 1.0  # a backup in step that acknowledges nothing for this long is given up
COPY_S = 30.0  # and one that is still being made
CONNECT_S = 5.0
AGAIN_S, AGAIN_MOST_S = 5.0, 320.0  # after a copy was given up, the next is tried; each time twice as long
LAG_S = 0.25  # this thread was held up: what has come meanwhile is not read yet
WINDOW = 128  # pieces under way
PIECE_BYTES = 4 << 20
HEAD_BYTES = 3000  # what fits into a message's header beside the rest
BEHIND_BYTES = 256 << 20  # of what has come while a copy was made

log = structlog.get_logger()
Report = Callable[[Standing], Awaitable[bool]]  # False: the shard lives elsewhere


class Stage(Enum):
    ALONE = auto()  # without a backup
    COPYING = auto()  # one is being made
    IN_STEP = auto()  # nothing is said that it does not have
    ASKING = auto()  # it is lost; nothing is said before the coordinator knows
    OVER = auto()  # the shard lives elsewhere; nothing is ever said again


@dataclass(slots=True)
class Piece:
    """Numbered when it is queued."""

    number: int
    message: Copy
    payload: Buffer


class Mirror:
    """One shard's. `append` and `settled` are for the shard, `pair` for its process."""

    def __init__(
        self,
        core: Shard,
        member: str,
        member_incarnation: int,
        home: int,
        dial: Callable[[str], Endpoint],
        report: Report,
    ) -> None:
        self.core = core
        self.member = member
        self.member_incarnation = member_incarnation
        self.home = home
        self.dial = dial
        self.report = report
        self.stage: Stage = Stage.ALONE
        self.order: Pair | None = None
        self.copy = 0
        # Of the state, made as they are sent; before all that is queued.
        self.chunks: Iterator[Piece] = iter(())
        self.queue: deque[Piece] = deque()
        self.queued_bytes = 0
        self.appended = 0  # pieces of this copy
        self.base_pieces = 0  # of them, those of the state
        self.acknowledged = 0  # pieces that the backup has, without a gap
        self.ready_at: int | None = None  # the backup has all that was ever said once it has so many pieces
        self.heard_at = 0.0  # when the backup acknowledged last, or had nothing to acknowledge
        self.broken = ""
        self.anew = False  # it was broken by the shard itself, and the next copy is made at once
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()  # by how much must be acknowledged
        self.woken = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.telling: asyncio.Task[None] | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.closing: set[asyncio.Task[None]] = set()  # connections of copies that are over

    # -- for the shard -----------------------------------------------------------------------------------

    def append(self, message: Message, payload: Buffer | None = None) -> None:
        """The shard takes this message now. Never waits and never fails."""
        if self.stage not in (Stage.COPYING, Stage.IN_STEP):
            return
        if isinstance(message, Assign) and message.checkpoint:
            # It would be followed only by who has that checkpoint, too: what the shard begins with is copied instead.
            self.anew = True
            self._break(f"its chunks begin with {message.checkpoint}")
            self._part()
            return
        head = msgspec.msgpack.encode(message)
        self._queue("message", head, payload if payload is not None else b"")
        if self.stage is Stage.COPYING and self.queued_bytes > BEHIND_BYTES:
            self._break(f"{self.queued_bytes >> 20} MB have come while it was made")
        self.woken.set()

    def settled(self) -> Awaitable[None] | None:
        """Until all that was appended may be spoken of; None: it may. Raises Refusal where it never may."""
        if self.stage is Stage.OVER:
            raise self._moved()
        if self.stage in (Stage.ALONE, Stage.COPYING):
            return None
        if self.stage is Stage.IN_STEP and self.acknowledged == self.appended:
            return None
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((self.appended, future))
        return future

    @property
    def is_over(self) -> bool:
        return self.stage is Stage.OVER

    # -- for its process ---------------------------------------------------------------------------------

    def pair(self, order: Pair) -> None:
        """Keep the backup there, or nowhere. Twice is the same as once, and what comes late means nothing."""
        if self.stage is Stage.OVER or (self.order is not None and order.number <= self.order.number):
            return
        self.order = order
        if self.connecting is not None:
            self.connecting.cancel()  # to a process that is not there any more
        self.woken.set()
        if self.task is None:
            self.task = asyncio.ensure_future(self._keep())

    def let_go(self) -> None:
        """The job is over: no backup will be promoted any more, and nothing waits for one."""
        self._cancel()
        if self.stage is not Stage.OVER:
            self.stage = Stage.ALONE
            self._release(self.appended)

    def close(self) -> None:
        """The process ends, or the shard lives elsewhere."""
        self._over()
        self._cancel()

    def _cancel(self) -> None:
        for task in (self.task, self.telling):
            if task is not None:
                task.cancel()

    # -- making copies -----------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """One copy after another, as long as the shard lives here."""
        pause_s = AGAIN_S
        while True:
            order = self.order
            assert order is not None
            if not order.addresses:
                await self._wake(COPY_S)
                continue
            because = await self._keep_at(order)
            if self.is_over:
                return
            if self.anew and self.order is order:
                self.anew = False
                continue
            log.warning("without a backup", shard=self.core.name, host=order.host, because=because)
            until = asyncio.get_running_loop().time() + pause_s
            while self.order is order and (left_s := until - asyncio.get_running_loop().time()) > 0:
                await self._wake(left_s)
            pause_s = min(2 * pause_s, AGAIN_MOST_S) if self.order is order else AGAIN_S

    async def _keep_at(self, order: Pair) -> str:
        """One copy; returns why it is over, and by then the coordinator has agreed or the shard is OVER."""
        because = await self._copy_to(order)
        if self.stage is Stage.ASKING:
            if await self.report(self._standing(order, because, ready=False)):
                self.stage = Stage.ALONE
                self._release(self.appended)
            else:
                self._over()
        return because

    async def _copy_to(self, order: Pair) -> str:
        """Make a copy and keep it in step, until something breaks: returns what."""
        self.copy += 1
        endpoint = self.dial(f"{self.core.name}.{self.home}.{self.copy}")
        await endpoint.start()
        under_way: set[asyncio.Future[None]] = set()
        try:
            connect = endpoint.connect(order.host, order.addresses, timeout_s=CONNECT_S)
            connecting = self.connecting = asyncio.ensure_future(connect)
            under_way.add(connecting)
            await asyncio.wait([connecting])
            under_way.discard(connecting)
            if connecting.cancelled():
                return f"{order.host} is gone"
            connecting.result()
            self._begin()
            return await self._send(endpoint, order, under_way)
        except TransportError as error:
            return str(error)
        finally:
            self._part()
            for task in under_way:
                task.cancel()
            self.queue.clear()
            self.queued_bytes = 0
            self.chunks = iter(())  # and with it what the shard was
            # Nobody waits for its goodbye, least of all those whose answers wait for the coordinator's leave.
            closing = asyncio.ensure_future(endpoint.close())
            self.closing.add(closing)
            closing.add_done_callback(self.closing.discard)

    def _begin(self) -> None:
        """The state as it is now, and behind it whatever comes from now on."""
        self.queue.clear()
        self.appended = self.acknowledged = self.queued_bytes = 0
        self.ready_at, self.broken, self.anew = None, "", False
        self.stage = Stage.COPYING
        state = state_of(self.core)
        if state.snapshot is not None:
            self.chunks = self._chunk_pieces(state.snapshot)
            self.appended = len(state.snapshot.described())
        self._queue("account", b"", msgspec.msgpack.encode(state.account))
        for name, tensor in state.tensors.items():
            self._queue("tensor", *base.packed(name, tensor))
        self._queue("end", b"", b"")
        self.base_pieces, self.queued_bytes = self.appended, 0
        self.heard_at = asyncio.get_running_loop().time()

    async def _send(self, endpoint: Endpoint, order: Pair, under_way: set[asyncio.Future[None]]) -> str:
        """Until something breaks."""
        while True:
            while len(under_way) < WINDOW and not self.broken and (piece := self._next()) is not None:
                self.queued_bytes -= len(memoryview(piece.payload)) if piece.number >= self.base_pieces else 0
                task = asyncio.ensure_future(self._send_one(endpoint, order.host, piece))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
            if self.order is not order:
                return f"{order.host} is gone, or another is to keep it"
            if self.broken or self.stage is Stage.OVER:
                return self.broken
            limit_s = SLOW_S if self.stage is Stage.IN_STEP else COPY_S
            loop = asyncio.get_running_loop()
            if self.acknowledged == self.appended:
                self.heard_at = loop.time()
            due = self.heard_at + limit_s
            if (late_s := loop.time() - due) >= 0:
                if late_s < LAG_S:
                    return f"{order.host} has acknowledged nothing for {limit_s:g} s"
                self.heard_at = loop.time()
                continue
            await self._wake(due - loop.time())

    async def _wake(self, within_s: float) -> None:
        try:
            async with asyncio.timeout(within_s):
                await self.woken.wait()
        except TimeoutError:
            pass
        self.woken.clear()

    async def _send_one(self, endpoint: Endpoint, host: str, piece: Piece) -> None:
        copy = self.copy
        try:
            await endpoint.request(host, piece.message, piece.payload, timeout_s=COPY_S)
        except TransportError as error:
            if copy == self.copy:
                self._break(str(error))
            return
        if copy == self.copy:
            self._heard(piece.number + 1)

    def _heard(self, acknowledged: int) -> None:
        """The backup has so many pieces."""
        if acknowledged <= self.acknowledged or self.stage not in (Stage.COPYING, Stage.IN_STEP):
            return
        self.acknowledged = acknowledged
        self.heard_at = asyncio.get_running_loop().time()
        if self.stage is Stage.COPYING and acknowledged >= self.base_pieces:
            # What was said before this moment must be there before the backup counts.
            self.stage, self.ready_at = Stage.IN_STEP, self.appended
        if self.ready_at is not None and acknowledged >= self.ready_at:
            self.ready_at = None
            self.telling = asyncio.ensure_future(self._tell())
        self._release(acknowledged)
        self.woken.set()

    async def _tell(self) -> None:
        assert self.order is not None
        order, copy = self.order, self.copy
        if not await self.report(self._standing(order, "", ready=True)):
            self._over()
        elif copy == self.copy and self.stage is Stage.IN_STEP:
            log.info("backup in step", shard=self.core.name, host=order.host, copy=copy)

    def _release(self, acknowledged: int) -> None:
        while self.waiting and (self.waiting[0][0] <= acknowledged or self.stage is Stage.ALONE):
            _, future = self.waiting.popleft()
            if not future.done():
                future.set_result(None)

    def _part(self) -> None:
        """What is said from now on, the copy does not have."""
        match self.stage:
            case Stage.IN_STEP:
                self.stage = Stage.ASKING
            case Stage.COPYING:
                self.stage = Stage.ALONE

    def _break(self, because: str) -> None:
        self.broken = self.broken or because
        self.woken.set()

    def _over(self) -> None:
        self.stage = Stage.OVER
        while self.waiting:
            _, future = self.waiting.popleft()
            if not future.done():
                future.set_exception(self._moved())
        self.woken.set()

    # -- pieces ------------------------------------------------------------------------------------------

    def _next(self) -> Piece | None:
        piece = next(self.chunks, None)
        return piece if piece is not None or not self.queue else self.queue.popleft()

    def _chunk_pieces(self, snapshot: Snapshot) -> Iterator[Piece]:
        """One for each tensor of a chunk: none is larger than a piece."""
        for number, (name, tensor) in enumerate(snapshot.tensors()):
            ((head, part, more),) = pieces(*base.packed(name, tensor))
            yield Piece(number, self._message(number, "tensor", head, more), part)

    def _queue(self, kind: str, head: bytes, payload: Buffer) -> None:
        for begins, part, more in pieces(head, payload):
            message = self._message(self.appended, kind, begins, more)
            self.queue.append(Piece(self.appended, message, part))
            self.queued_bytes += len(part)
            self.appended += 1

    def _message(self, number: int, kind: str, head: bytes, more: bool) -> Copy:
        return Copy(
            job=self.core.job,
            shard=self.core.name,
            home=self.home,
            copy=self.copy,
            number=number,
            kind=kind,  # type: ignore[arg-type]
            head=head,
            more=more,
        )

    def _standing(self, order: Pair, because: str, *, ready: bool) -> Standing:
        return Standing(
            job=self.core.job,
            member=self.member,
            incarnation=self.member_incarnation,
            shard=self.core.name,
            home=self.home,
            copy=self.copy,
            ready=ready,
            host=order.host,
            host_incarnation=order.host_incarnation,
            because=because[:300],
        )

    def _moved(self) -> Refusal:
        return Refusal("moved", f"{self.core.name} does not live in this process any more")


def pieces(head: bytes, payload: Buffer) -> Iterator[tuple[bytes, memoryview, bool]]:
    """Head and payload as what fits into messages: nearly always one, and its payload as it came."""
    whole = memoryview(payload).cast("B")
    if len(head) > HEAD_BYTES:
        whole, head = memoryview(LENGTH.pack(len(head)) + head + bytes(whole)), b""
    yield head, whole[:PIECE_BYTES], len(whole) > PIECE_BYTES
    for at in range(PIECE_BYTES, len(whole), PIECE_BYTES):
        yield b"", whole[at : at + PIECE_BYTES], len(whole) > at + PIECE_BYTES
