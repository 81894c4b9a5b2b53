"""The coordinator: events in, the machine decides, actions out.

It decides nothing itself: who is a member, who starts, who is fenced and how the job ends is `scheduler.machine`; which
worker computes which batch is `scheduler.batches`. Rule: every action is written to the run's events before it is
performed, with its reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import structlog
from msgspec import Struct

from . import rundir
from .board import Board, why
from .events import EventLog
from .lease import COORDINATOR
from .link import LISTENER, control_endpoint, listen
from .messages import (
    Ask,
    Assign,
    Assignment,
    Claim,
    Claimed,
    Drain,
    Drained,
    EpochOpened,
    EpochOver,
    Exited,
    Fenced,
    Fetch,
    Fetched,
    Heartbeat,
    Homes,
    JobSpec,
    Join,
    Joined,
    Kept,
    Launch,
    Leave,
    Loaded,
    Message,
    Moved,
    Note,
    Ok,
    OpenEpoch,
    Piece,
    Pulse,
    Register,
    Registered,
    Report,
    Returned,
    Settle,
    Stands,
    Status,
    Stop,
    Take,
    Taken,
    Wait,
    Where,
)
from .notes import Notes
from .rosters import Account, Rosters
from .scheduler import actions, batches, events
from .scheduler.ids import JobId, ShardId, WorkerId
from .scheduler.machine import Machine
from .scheduler.rules import Rules
from .status import JobStatus
from .transport import Answer, Endpoint, Handler, Refusal, Refused, TransportError

HOLD_S = 1.0  # who must wait is answered after this long, with the names of who is waited for
ASSIGN_S = (
    300.0  # for a shard to make room, and on its machine's first sparse job to compile the codec's kernels
)
ORDER_S = 30.0  # a member that takes no order for this long is left to its lease
EARLY_S = 0.02
NAMED = 32  # of those who are waited for, in one answer
GOODBYE_S = 8.0  # at the end of a job: for members to take their Stop and end

if TYPE_CHECKING:
    from .config import Settings

log = structlog.get_logger()
Reply = Message | tuple[Message, bytes | None]


class Checkpoints(Protocol):
    """Whoever makes checkpoints, and has the one that the job goes on from."""

    def handle(
        self, message: Piece | Kept | Fetch, payload: memoryview | None
    ) -> Reply | Awaitable[Reply]: ...


class Coordinator:
    """One job's conversation; the machine underneath serves many.

    `changed` is set and replaced at each change, so that whoever waits for one can look again.
    """

    def __init__(
        self,
        job: JobId,
        spec: JobSpec,
        machine: Machine,
        endpoint: Callable[[Handler], Endpoint],
        event_log: EventLog,
        *,
        heartbeat_s: float,
        run_dir: str = "",
    ) -> None:
        self.job = job
        self.spec = spec
        self.machine = machine
        self.events = event_log
        self.heartbeat_s = heartbeat_s
        self.run_dir = run_dir
        self.endpoint = endpoint(self.handle)
        self.ledger = batches.Ledger()
        self.board = Board(spec)
        self.peers: dict[str, str] = {}  # member -> the endpoint that speaks for it
        self.addresses: dict[str, list[str]] = {}  # shard -> where it takes pushes
        self.answers: dict[str, Message | Refusal] = {}  # peer -> how its Join ends; filled by `perform`
        self.registration: bytes = b""
        self.placement: tuple[int, ...] = ()
        self.assigned: set[str] = set()  # the shards that have taken the layout
        self.initialiser = ""
        self.loaded = False
        self.scripts: dict[str, str] = {}  # worker -> the endpoint of its script
        self.claims: dict[str, str] = {}  # what -> the worker that may write it
        self.notes = Notes(self.ledger)
        self.checkpointer: Checkpoints | None = None
        self.orders: set[asyncio.Task[bool]] = set()
        self.rosters = Rosters(
            job, self.ledger, lambda: machine.shards(job), self.ask_settled, lambda *order: self.order(*order)
        )
        self.rosters.changed = self.wake
        self.changed = asyncio.Event()
        self.finished: asyncio.Future[int] | None = None
        self.interrupts = 0
        self.timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen, and take the job on."""
        self.finished = asyncio.get_running_loop().create_future()
        await listen(self.endpoint)
        self.dispatch(
            events.Submitted(
                self.job, workers=self.spec.workers, shards=self.spec.shards, staleness=self.spec.staleness
            )
        )

    async def run(self) -> int:
        """Serve until the job is over and its members have gone; returns the job's exit code."""
        assert self.finished is not None, "start() comes first"
        code = await self.finished
        if self.orders:
            await asyncio.wait(self.orders, timeout=GOODBYE_S)
        return code

    def interrupt(self, name: str) -> None:
        """The first signal drains the job, the second ends it."""
        self.interrupts += 1
        because = f"{name} at the coordinator"
        self.dispatch(
            events.DrainAsked(self.job, because)
            if self.interrupts == 1
            else events.Cancelled(self.job, because)
        )

    async def close(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        tasks = [*self.orders, *self.rosters.tasks()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.endpoint.close()
        self.events.close()

    # -- deciding and acting ---------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> None:
        """Hand an event to the machine and perform what it orders. The only place that does."""
        loop = asyncio.get_running_loop()
        performed = self.machine.handle(event, loop.time())
        for action in performed:
            self.events.write(action)
            self.perform(action)
        if self.timer is not None:
            self.timer.cancel()
        deadline = self.machine.next_deadline()
        self.timer = (
            None if deadline is None else loop.call_at(deadline, self.dispatch, events.Ticked(self.job))
        )
        if not isinstance(event, events.Renewed) or performed:
            self.wake()  # not at every heartbeat: each worker that waits would look again

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def perform(self, action: actions.Action) -> None:
        """Carry out one action. Nothing here waits: what takes time becomes a task with a deadline."""
        match action:
            case actions.Admit():
                self.peers[action.member] = action.peer
                self.answers[action.peer] = Joined(
                    job=self.job,
                    member=action.member,
                    incarnation=action.incarnation,
                    generation=action.generation,
                    heartbeat_s=self.heartbeat_s,
                    lease_s=self.machine.rules.lease_s,
                    run_dir=self.run_dir,
                )
            case actions.Refuse():
                self.answers[action.peer] = Refusal("refused", action.because)
            case actions.Announce():
                self.rosters.announce(action.generation, action.seats)
            case actions.Launch():
                self.order(action.worker, Launch(self.job, action.worker, action.incarnation))
            case actions.Place():
                self.placement = action.placement
                for shard in self.machine.shards(self.job):
                    self.assign(shard)
            case actions.Initialise():
                self.initialiser = action.worker
            case actions.Await():
                log.warning("waiting for a shard", shard=action.shard, because=action.because)
            case actions.Rehome():
                self.rehome(action.shard, action.incarnation)
            case actions.Fence():
                peer = self.peers.get(action.member, "")
                self.endpoint.notify(
                    peer, Fenced(self.job, action.member, action.incarnation, action.because)
                )
                self.release(action.member)
            case actions.Stop():
                self.order(action.member, Stop(self.job, action.because))
            case actions.Drain():
                self.ledger.drain(action.because)
                for peer in self.scripts.values():
                    self.endpoint.notify(peer, Drained(self.job, action.because))
            case actions.Finish():
                log.info("job over", job=self.job, state=action.state.name, because=action.because)
                if self.finished is not None and not self.finished.done():
                    self.finished.set_result(action.exit_code)

    def release(self, member: str) -> None:
        """This worker did not come to the end of its script: others may write the files that it was to write."""
        self.claims = {what: owner for what, owner in self.claims.items() if owner != member}

    def is_current(self, message: Exited | Leave) -> bool:
        return self.machine.is_current(self.job, message.member, message.incarnation)

    def order(
        self, member: str, message: Message, payload: bytes | None = None, within_s: float = ORDER_S
    ) -> asyncio.Task[bool]:
        """Send an order until it is taken, which the result tells; who does not take it is left to its lease."""
        task = asyncio.ensure_future(self._order(member, message, payload, within_s))
        self.orders.add(task)
        task.add_done_callback(self.orders.discard)
        return task

    async def _order(self, member: str, message: Message, payload: bytes | None, within_s: float) -> bool:
        return await self.ask(member, message, payload, within_s) is not None

    async def ask(
        self, member: str, message: Message, payload: bytes | None = None, within_s: float = ORDER_S
    ) -> Answer | None:
        """Send an order until it is taken; its answer, or None where it was not."""
        until = asyncio.get_running_loop().time() + within_s
        while True:
            try:
                return await self.endpoint.request(self.peers[member], message, payload, timeout_s=within_s)
            except Refused as refused:
                # An order may overtake the answer to the member's own join.
                if refused.code == "early" and asyncio.get_running_loop().time() < until:
                    await asyncio.sleep(EARLY_S)
                    continue
                because = refused.because
            except TransportError as error:
                because = str(error)
            log.warning("order not taken", member=member, order=type(message).__name__, because=because)
            return None

    async def ask_settled(self, shard: str, message: Settle) -> Account | None:
        """Where a lost worker stands on this shard; None where the shard does not say."""
        if not self.serves(shard):
            return None
        answer = await self.ask(shard, message)
        if answer is None or not isinstance(answer.message, Stands):
            return None
        return Account(answer.message, bytes(answer.payload or b""))

    def assign(self, shard: str) -> None:
        """Give this shard the layout and the placement; when all have them, workers may go on."""
        payload = msgspec.msgpack.encode(Assignment(self.registration, list(self.placement)))
        message = Assign(self.job, shard, self.spec.staleness, self.spec.compress)
        peer = self.peers[shard]

        def ended(order: asyncio.Task[bool]) -> None:
            if order.cancelled() or self.peers[shard] != peer:
                return  # the process that has come in its place was given the same order
            if order.result():
                self.assigned.add(shard)
                self.wake()
            elif self.serves(shard):
                because = f"{shard} did not take the layout; its log says why"
                self.dispatch(events.Cancelled(self.job, because))

        self.order(shard, message, payload, ASSIGN_S).add_done_callback(ended)

    def rehome(self, shard: str, incarnation: int) -> None:
        """A shard serves its chunks again: it gets what it has missed, and the scripts its address."""
        if self.placement:
            self.assign(shard)
        self.rosters.again(shard)
        for peer in self.scripts.values():
            self.endpoint.notify(peer, Moved(self.job, shard, incarnation, self.addresses[shard]))

    def serves(self, shard: str) -> bool:
        """Is this shard alive, with its chunks?"""
        job = self.machine.jobs.get(self.job)
        return job is not None and shard in job.members.alive("shard") and shard not in job.away

    def where(self, message: Where) -> Reply:
        """Where a shard is, for a worker that has lost it."""
        self.admit(message.worker, message.incarnation)
        if message.shard not in self.machine.shards(self.job):
            raise Refusal("placement", f"there is no shard {message.shard}")
        if not self.serves(ShardId(message.shard)):
            return self.wait([message.shard], "it is gone, and its chunks are only there")
        incarnation = self.machine.jobs[self.job].members.alive("shard")[ShardId(message.shard)].incarnation
        return Moved(self.job, message.shard, incarnation, self.addresses[message.shard])

    # -- looking -------------------------------------------------------------------------------------

    def status(self) -> JobStatus:
        """What is going on, for whoever asks."""
        status = self.board.status(
            self.machine.jobs.get(self.job) or self.machine.over[self.job],
            self.ledger,
            asyncio.get_running_loop().time(),
        )
        return msgspec.structs.replace(status, events=list(self.events.recent), run_dir=self.run_dir)

    # -- messages -------------------------------------------------------------------------------------------

    def handle(
        self, peer: str, message: Struct, payload: memoryview | None
    ) -> Reply | Awaitable[Reply] | None:
        """One message of a member, a script or an onlooker."""
        if isinstance(message, Ask):
            return Status(self.job), msgspec.json.encode(self.status())
        job = getattr(message, "job", "")
        if job not in ("", self.job):
            raise Refusal("job", f"this coordinator serves job {self.job}, not {job}")
        match message:
            case Join():
                return self.join(peer, message)
            case Heartbeat():
                self.dispatch(events.Renewed(self.job, message.member, message.incarnation))
                if not self.machine.is_current(self.job, message.member, message.incarnation):
                    # It was told when it was fenced, if it could be reached then.
                    because = "another process took its place, or it was silent for too long"
                    self.endpoint.notify(peer, Fenced(self.job, message.member, message.incarnation, because))
                    return None
                self.board.heard(message.member, asyncio.get_running_loop().time())
                self.endpoint.notify(peer, Pulse(self.job, self.machine.generation(self.job)))
                return None
            case Exited():
                if message.signal and self.is_current(message):  # a script that fails ends the job
                    self.release(message.member)
                if message.failure is not None:
                    self.board.failed(message.member, message.failure)
                because = why(message)
                self.dispatch(
                    events.Exited(
                        self.job, message.member, message.incarnation, message.code, message.signal, because
                    )
                )
                return Ok()
            case Leave():
                if self.is_current(message):
                    self.release(message.member)
                self.dispatch(events.Left(self.job, message.member, message.incarnation, message.because))
                return Ok()
            case Drain():
                self.dispatch(events.DrainAsked(self.job, message.because))
                return Ok()
            case Returned():
                holds = message.holds
                if not holds and message.member not in self.assigned:
                    holds = digest_of(self.registration)  # nobody has brought it any parameters yet
                self.dispatch(events.Returned(self.job, message.member, message.incarnation, holds))
                return Ok()
            case Where():
                return self.where(message)
            case Report():
                self.admit(message.worker, message.incarnation)
                self.board.report(message, asyncio.get_running_loop().time())
                return None
            case Register():
                return self.register(peer, message, bytes(payload or b""))
            case Loaded():
                self.admit(message.worker, message.incarnation)
                self.loaded = True
                self.dispatch(events.Loaded(self.job, message.worker, message.incarnation))
                return Ok()
            case OpenEpoch():
                return self.open_epoch(message, bytes(payload or b""))
            case Note():
                self.admit(message.worker, message.incarnation)
                return self.notes.take(message, bytes(payload or b""))
            case Take():
                return self.take(message, payload)
            case Piece() | Kept() | Fetch():
                return self.of_checkpoint(message, payload)
            case Claim():
                self.admit(message.worker, message.incarnation)
                owner = self.claims.setdefault(message.what, message.worker)
                return Claimed(self.job, owner == message.worker, owner)
        raise Refusal("unexpected", f"a coordinator does not take {type(message).__name__}")

    def join(self, peer: str, message: Join) -> Reply:
        self.dispatch(events.Joined(self.job, message.role, message.member, peer))
        answer = self.answers.pop(peer)
        if isinstance(answer, Refusal):
            raise answer
        assert isinstance(answer, Joined)
        if message.role == "shard":
            self.addresses[answer.member] = message.addresses
        self.board.joined(message, answer, asyncio.get_running_loop().time())
        return answer, msgspec.msgpack.encode(self.spec)

    def admit(self, worker: str, incarnation: int) -> None:
        """Refuse a script whose incarnation is over."""
        if not self.machine.is_current(self.job, worker, incarnation):
            raise Refusal(
                "fenced",
                f"{worker}#{incarnation} is not a member of generation {self.machine.generation(self.job)}",
            )

    async def register(self, peer: str, message: Register, registration: bytes) -> Reply:
        self.admit(message.worker, message.incarnation)
        self.scripts[message.worker] = peer
        if digest_of(registration) != message.digest:
            raise Refusal("layout", "the layout's digest does not match its bytes")
        self.registration = self.registration or registration
        self.dispatch(
            events.Registered(self.job, message.worker, message.incarnation, message.digest, message.chunks)
        )
        if message.digest != digest_of(self.registration):
            raise Refusal("layout", f"{message.worker} registered another layout than the workers before it")
        shards = self.machine.shards(self.job)
        if not await self.until(lambda: self.assigned.issuperset(shards)):
            # The first sparse job of a machine compiles half a minute and more.
            return self.wait([s for s in shards if s not in self.assigned], "they take the layout")
        if not await self.until(lambda: self.loaded or self.initialiser == message.worker):
            return self.wait([self.initialiser], f"{self.initialiser} brings the first parameters")
        await self.until(self.notes.complete)  # one that is on its way; its sender may also be gone
        reply = Registered(
            job=self.job,
            generation=self.machine.generation(self.job),
            initialiser="" if self.loaded else self.initialiser,
            staleness=self.spec.staleness,
            compress=self.spec.compress,
            workers=self.spec.workers,
            epoch=self.ledger.epoch,
        )
        addresses = [self.addresses[shard] for shard in shards]
        homes = Homes(list(shards), addresses, list(self.placement), self.notes.newest)
        return reply, msgspec.msgpack.encode(homes)

    def of_checkpoint(
        self, message: Piece | Kept | Fetch, payload: memoryview | None
    ) -> Reply | Awaitable[Reply]:
        """Files of checkpoints, from members and to them."""
        self.admit(message.member, message.incarnation)
        if self.checkpointer is not None:
            return self.checkpointer.handle(message, payload)
        if isinstance(message, Fetch):
            return Fetched(self.job, -1)
        raise Refusal("checkpoint", "no checkpoint is being made")

    async def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition, HOLD_S at most; whether it holds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + HOLD_S
        while not condition() and loop.time() < end:
            try:
                async with asyncio.timeout_at(end):
                    await self.changed.wait()
            except TimeoutError:
                break
        return condition()

    # -- data ------------------------------------------------------------------------------------------------

    async def open_epoch(self, message: OpenEpoch, state: bytes) -> Reply:
        """Answered once the senior worker has shown its generator state and the epoch before is over."""
        self.admit(message.worker, message.incarnation)
        worker = WorkerId(message.worker)
        end = asyncio.get_running_loop().time() + HOLD_S
        while True:
            opened = self.ledger.open(worker, message.epoch, message.batches, state)
            if not isinstance(opened, batches.Waiting):
                self.wake()
                break
            if not await self.pause(end):
                break
            self.admit(message.worker, message.incarnation)
        match opened:
            case batches.Opened():
                opener = self.notes.from_whom(message.epoch)
                return EpochOpened(self.job, message.epoch, opened.first_clock, opener), opened.token
            case batches.Drained():
                return Drained(self.job, opened.because)
            case batches.Mismatch():
                raise Refusal("epoch", opened.because)
        return self.wait(opened.waiting_for, opened.because)

    async def take(self, message: Take, done: memoryview | None) -> Reply:
        self.admit(message.worker, message.incarnation)
        worker = WorkerId(message.worker)
        self.ledger.reached(message.epoch, message.clock)
        if done is not None:
            try:
                applied = msgspec.msgpack.decode(done, type=list[tuple[int, int]])
            except msgspec.MsgspecError as bad:
                raise Refusal("ledger", f"the batches that are applied cannot be read: {bad}") from None
            refused = self.ledger.commit(worker, message.epoch, spread(applied, self.ledger.batches))
            if refused is not None:
                raise Refusal("ledger", refused.because)
            self.wake()
        end = asyncio.get_running_loop().time() + (HOLD_S if message.hold else 0.0)
        while True:
            taken = self.ledger.take(worker, message.epoch, message.most)
            if not isinstance(taken, batches.Waiting) or not await self.pause(end):
                break
            self.admit(message.worker, message.incarnation)
        match taken:
            case batches.Taken():
                return Taken(self.job, message.epoch, list(taken.batches))
            case batches.Over():
                return EpochOver(self.job, message.epoch, taken.next_clock)
            case batches.Drained():
                return Drained(self.job, taken.because)
            case batches.Mismatch():
                raise Refusal("ledger", taken.because)
        return self.wait(taken.waiting_for, taken.because, dealt_again=self.ledger.dealt_again)

    def wait(self, whom: Sequence[str], because: str, *, dealt_again: bool = False) -> Wait:
        return Wait(self.job, list(whom[:NAMED]), because, dealt_again)

    async def pause(self, end: float) -> bool:
        """Until something changes; False when `end` came first."""
        try:
            async with asyncio.timeout_at(end):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True


def digest_of(registration: bytes) -> str:
    """What two workers' layouts are compared by; `layout.Registration.digest` is the same."""
    return hashlib.blake2b(registration, digest_size=16).hexdigest()


def spread(runs: Iterable[tuple[int, int]], most: int) -> list[int]:
    """The numbers of [first, last] runs, `client.runs` the other way; Refusal if they are more than `most`."""
    numbers: list[int] = []
    for first, last in runs:
        if not 0 <= first <= last or len(numbers) + last - first >= most:
            raise Refusal("ledger", f"there are no batches {first} to {last} in an epoch of {most}")
        numbers += range(first, last + 1)
    return numbers


def serve(settings: Settings, spec: JobSpec) -> int:
    """Coordinate one job until it is over; returns its exit code. Raises ZmlError for a person to read."""
    import uvloop

    return uvloop.run(_serve(settings, spec))


async def _serve(settings: Settings, spec: JobSpec) -> int:
    loop = asyncio.get_running_loop()
    folder = Path(settings.run_dir)

    def listening(handler: Handler) -> Endpoint:
        return control_endpoint(settings, COORDINATOR, handler, keys=(LISTENER,), bind=settings.bind)

    coordinator = Coordinator(
        JobId(settings.job),
        spec,
        Machine(
            Rules(
                lease_s=settings.lease_s,
                lease_most_s=max(5.0, 3 * settings.lease_s),
                return_s=settings.return_s,
            )
        ),
        listening,
        EventLog(folder / rundir.EVENTS),
        heartbeat_s=settings.heartbeat_s,
        run_dir=str(folder),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, coordinator.interrupt, signal.Signals(number).name)
    try:
        await coordinator.start()
        here = rundir.Listening(list(coordinator.endpoint.addresses), os.getpid(), settings.job)
        rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))
        log.info("listening", addresses=here.addresses, job=settings.job)
        code = await coordinator.run()
        rundir.write(folder / rundir.STATUS, msgspec.json.encode(coordinator.status()))
        return code
    finally:
        await coordinator.close()
