"""The coordinator: events in, the machine decides, actions out.

It decides nothing itself: who is a member, who starts, who is fenced and how the job ends is `scheduler.machine`; which
worker computes which batch is `scheduler.batches`. Rules: every action is written to the run's events before it is
performed, with its reason; what has changed is in the journal before an order goes out or an answer is given, so that
another process goes on from there when this one dies (`docket`). While the journal has no room, nothing is changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace

import msgspec
import structlog
from msgspec import Struct

from .board import Board, why
from .docket import Docket
from .events import EventLog
from .facts import Begun, Entered, Failed, Listening, Shown
from .journal import Journal
from .lease import NO_ROOM
from .link import listen
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
    Heartbeat,
    Homes,
    JobSpec,
    Join,
    Joined,
    Launch,
    Leave,
    Loaded,
    Message,
    Ok,
    OpenEpoch,
    Pulse,
    Register,
    Registered,
    Report,
    Roster,
    Seat,
    Status,
    Stop,
    Take,
    Taken,
    Wait,
)
from .orders import Orders
from .scheduler import actions, batches, events
from .scheduler.ids import JobId, WorkerId
from .scheduler.machine import Machine
from .scheduler.state import Draining, Finishing, Running
from .status import JobStatus, MemberFailure
from .transport import Endpoint, Handler, Refusal

HOLD_S = 1.0  # who must wait is answered after this long, with the names of who is waited for
ASSIGN_S = (
    300.0  # for a shard to make room, and on its machine's first sparse job to compile the codec's kernels
)
NAMED = 32  # of those who are waited for, in one answer
GRACE_S = 8.0  # for everybody to find a coordinator that was started again: they dial every 5 s at the latest
LINGER_S = 3.0  # for those who do not know that the job is over to ask
ROOM_S = 0.5  # how often it is tried to write what the journal had no room for
TICK_S = 0.001
PROGRESS_S = 5.0
GOODBYE_S = 8.0  # at the end of a job: for members to take their Stop and end

log = structlog.get_logger()
Reply = Message | tuple[Message, bytes | None]


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
        journal: Journal | None = None,
    ) -> None:
        """Where the journal holds a job, that one goes on, as it was asked for then. Raises ZmlError."""
        self.docket = docket = Docket(job, machine, journal, asyncio.get_running_loop().time)
        begun = docket.facts.begun or Begun(job, spec, machine.rules.lease_s, heartbeat_s, time.time())
        if begun.lease_s != machine.rules.lease_s:  # the members know the one that was set then
            most_s = max(machine.rules.lease_most_s, begun.lease_s)
            machine.rules = replace(machine.rules, lease_s=begun.lease_s, lease_most_s=most_s)
        self.begun = begun
        self.job = docket.job
        self.spec = begun.spec
        self.machine = machine
        self.ledger = docket.ledger
        self.facts = docket.facts
        self.events = event_log
        self.run_dir = run_dir
        self.endpoint = endpoint(self.handle)
        self.board = Board(self.spec, self.facts.failures)
        # member -> the endpoint that speaks for it, behind the docket's by the actions that are to be performed
        self.peers = dict(self.facts.peers)
        self.answers: dict[str, Message | Refusal] = {}  # peer -> how its Join ends; filled by `perform`
        self.assigned: asyncio.Task[None] | None = None
        self.held: list[actions.Action] = []  # to be performed as soon as the journal has what led to them
        self.orders = Orders(self.endpoint, self.peers, self.is_still_to_come)
        self.changed = asyncio.Event()
        self.finished: asyncio.Future[int] | None = None
        self.seen_off: set[str] = set()  # peers that were told of the end when they were heard after it
        self.interrupts = 0
        self.progress_at = -math.inf
        self.timer: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen, and take the job on, or go on with it."""
        self.finished = asyncio.get_running_loop().create_future()
        if self.docket.resumed:
            self.machine.watch(self.docket.now, max(GRACE_S, 3 * self.machine.rules.lease_s))
        await listen(self.endpoint)
        if self.facts.begun is None:
            self.docket.fact(self.begun)
        self.docket.fact(
            Listening(list(self.endpoint.addresses), os.getpid(), socket.gethostname(), time.time())
        )
        if self.docket.resumed:
            self.resume()
        if not (self.job in self.machine.jobs or self.job in self.machine.over):
            asked = self.spec
            self.dispatch(
                events.Submitted(
                    self.job, workers=asked.workers, shards=asked.shards, staleness=asked.staleness
                )
            )

    async def run(self) -> int:
        """Serve until the job is over and its members have gone; returns the job's exit code."""
        assert self.finished is not None, "start() comes first"
        was_over = self.finished.done()
        code = await self.finished
        if was_over:  # they do not know yet
            await asyncio.sleep(LINGER_S)
        await self.orders.finish(GOODBYE_S)
        return code

    def resume(self) -> None:
        """Another process was the coordinator. Everybody is given time to be heard again, and told what it may have
        missed: an order twice is the same as once."""
        self.board.recall(self.facts, asyncio.get_running_loop().time())
        over = self.machine.over.get(self.job)
        if over is not None and self.finished is not None:
            log.info("job was over", job=self.job, state=over.state.name, because=over.because)
            self.finished.set_result(over.exit_code)
        job = self.docket.running
        if job is None:
            return
        log.info("job goes on", job=self.job, state=job.state.name, boots=self.facts.boots)
        because = "the coordinator was started again"
        self.events.note("the coordinator goes on", because)
        match job.phase:
            case Running() | Draining():
                seats = job.members.seats()
                self.perform(actions.Announce(self.job, job.generation, seats, because))
                for seat in seats:
                    self.perform(actions.Launch(self.job, seat.worker, seat.incarnation, because))
                if self.facts.placement:
                    self.perform(actions.Place(self.job, self.facts.placement, because))
                if isinstance(job.phase, Draining):
                    self.perform(actions.Drain(self.job, job.phase.because))
            case Finishing():
                for member in job.members.everybody():
                    self.perform(actions.Stop(self.job, member, job.phase.because))
        self.look_again()

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
        self.abandon()
        await asyncio.gather(*self.orders.tasks, return_exceptions=True)
        await self.endpoint.close()
        self.events.close()
        if self.docket.journal is not None:
            self.docket.journal.close()

    def abandon(self) -> None:
        """Decide and order nothing more."""
        if self.timer is not None:
            self.timer.cancel()
        self.orders.cancel()
        if self.assigned is not None:
            self.assigned.cancel()

    # -- deciding and acting ---------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> None:
        """Hand an event to the machine and perform what it orders. The only place that does."""
        decided: list[actions.Action] = []
        if isinstance(event, events.Renewed):  # heard at last, before its lease is looked at
            decided += self.docket.event(event)
        # What time has done changes the state too: it has to wait while nothing can be written.
        while self.docket.settled() and (finding := self.machine.finding(self.docket.now)) is not None:
            decided += self.docket.event(finding)
        if not isinstance(event, events.Renewed):
            decided += self.docket.event(event)
        self.held += decided
        if self.docket.settled():
            held, self.held = self.held, []
            for action in held:
                self.events.write(action)
                self.perform(action)
        self.look_again()
        if not isinstance(event, events.Renewed) or decided:
            self.wake()  # not at every heartbeat: each worker that waits would look again

    def look_again(self) -> None:
        """Come back when time will have done something, or when there may be room in the journal again."""
        loop = asyncio.get_running_loop()
        if self.timer is not None:
            self.timer.cancel()
        deadline = self.machine.next_deadline()
        at = None
        if deadline is not None:  # rounded, it could be a little too early, and that again and again
            at = max(self.docket.by_clock(deadline), loop.time() + TICK_S)
        if not self.docket.settled():
            at = loop.time() + ROOM_S
        self.timer = None if at is None else loop.call_at(at, self.dispatch, events.Ticked(self.job))

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
                    heartbeat_s=self.begun.heartbeat_s,
                    lease_s=self.begun.lease_s,
                    run_dir=self.run_dir,
                )
            case actions.Refuse():
                self.answers[action.peer] = Refusal("refused", action.because)
            case actions.Announce():
                seats = [Seat(seat.worker, seat.incarnation, seat.founder) for seat in action.seats]
                self.docket.members(action.seats)
                for shard in self.machine.shards(self.job):
                    self.orders.roster(
                        shard, Roster(self.job, action.generation), msgspec.msgpack.encode(seats)
                    )
            case actions.Launch():
                self.orders.send(action.worker, Launch(self.job, action.worker, action.incarnation))
            case actions.Place():
                self.assigned = asyncio.ensure_future(self.assign())
            case actions.Fence():
                peer = self.peers.get(action.member, "")
                self.endpoint.notify(
                    peer, Fenced(self.job, action.member, action.incarnation, action.because)
                )
            case actions.Stop():
                self.orders.send(action.member, Stop(self.job, action.because))
            case actions.Drain():
                self.docket.drain(action.because)
                for peer in self.facts.scripts.values():
                    self.endpoint.notify(peer, Drained(self.job, action.because))
            case actions.Finish():
                log.info("job over", job=self.job, state=action.state.name, because=action.because)
                if self.finished is not None and not self.finished.done():
                    self.finished.set_result(action.exit_code)

    def is_current(self, member: str, incarnation: int) -> bool:
        return self.machine.is_current(self.job, member, incarnation)

    def is_member_at(self, member: str, peer: str) -> bool:
        """Is this process that member, as far as is known?"""
        job = self.docket.running
        return job is not None and job.members.at_peer(peer) == member

    def is_still_to_come(self, member: str, peer: str) -> bool:
        """A member may not have found this process yet, if it took another's place."""
        return self.docket.resumed and self.is_member_at(member, peer)

    async def assign(self) -> None:
        """Give every shard the layout and the placement; then workers may go on."""
        payload = msgspec.msgpack.encode(Assignment(self.facts.registration, list(self.facts.placement)))
        shards = self.machine.shards(self.job)
        assign = {shard: Assign(self.job, shard, self.spec.staleness, self.spec.compress) for shard in shards}
        orders = [self.orders.send(shard, message, payload, ASSIGN_S) for shard, message in assign.items()]
        taken = await asyncio.gather(*orders)
        missing = [shard for shard, done in zip(shards, taken, strict=True) if not done]
        if missing and not self.is_ending():
            because = f"{', '.join(missing)} did not take the layout; the log of {missing[0]} says why"
            self.dispatch(events.Cancelled(self.job, because))
        self.wake()

    def is_ending(self) -> bool:
        job = self.docket.running
        return job is None or isinstance(job.phase, Finishing)

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
        if isinstance(message, Heartbeat):
            self.heartbeat(peer, message)
            return None
        if isinstance(message, Report):
            self.admit(message.worker, message.incarnation)
            self.report(message)
            return None
        self.settle()  # or nothing is changed
        reply = self.change(peer, message, payload)
        if isinstance(reply, Awaitable):
            return self.settled(reply)
        self.settle()  # or nothing is said of it; whoever asks again is answered the same
        return reply

    async def settled(self, reply: Awaitable[Reply]) -> Reply:
        answer = await reply
        self.settle()
        return answer

    def settle(self) -> None:
        """What has changed is written. Raises Refusal where it cannot be."""
        if not self.docket.settled():
            raise Refusal(NO_ROOM, self.docket.trouble)

    def heartbeat(self, peer: str, message: Heartbeat) -> None:
        current = self.is_current(message.member, message.incarnation)
        if current and self.is_member_at(message.member, peer):
            self.dispatch(events.Renewed(self.job, message.member, message.incarnation))
            self.board.heard(message.member, asyncio.get_running_loop().time())
            self.endpoint.notify(peer, Pulse(self.job, self.machine.generation(self.job)))
            return
        job = self.docket.running
        if job is None:  # it did not hear of the end
            if peer not in self.seen_off:
                self.seen_off.add(peer)
                self.orders.stranger(peer, Stop(self.job, "the job is over"))
            return
        # It was told when it was fenced, if it could be reached then.
        because = "another process took its place"
        if not current:
            because = job.members.why_not(message.member, message.incarnation)
            if message.member not in job.members.records:
                because += " of this job, as far as the coordinator's journal says"
        self.endpoint.notify(peer, Fenced(self.job, message.member, message.incarnation, because))

    def report(self, message: Report) -> None:
        now = asyncio.get_running_loop().time()
        self.board.report(message, now)
        if now - self.progress_at >= PROGRESS_S and self.docket.settled():
            self.progress_at = now
            self.docket.fact(self.board.progress(now))

    def change(self, peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
        """A message that may change something."""
        match message:
            case Join():
                return self.join(peer, message)
            case Exited():
                if message.failure is not None and self.is_current(message.member, message.incarnation):
                    self.docket.fact(Failed(MemberFailure(member=message.member, failure=message.failure)))
                because = why(message)
                self.dispatch(
                    events.Exited(
                        self.job, message.member, message.incarnation, message.code, message.signal, because
                    )
                )
                return Ok()
            case Leave():
                self.dispatch(events.Left(self.job, message.member, message.incarnation, message.because))
                return Ok()
            case Drain():
                self.dispatch(events.DrainAsked(self.job, message.because))
                return Ok()
            case Register():
                return self.register(peer, message, bytes(payload or b""))
            case Loaded():
                self.admit(message.worker, message.incarnation)
                self.dispatch(events.Loaded(self.job, message.worker, message.incarnation))
                return Ok()
            case OpenEpoch():
                return self.open_epoch(message, bytes(payload or b""))
            case Take():
                return self.take(message, payload)
            case Claim():
                self.admit(message.worker, message.incarnation)
                owner = self.docket.claim(message.what, message.worker)
                return Claimed(self.job, owner == message.worker, owner)
        raise Refusal("unexpected", f"a coordinator does not take {type(message).__name__}")

    def join(self, peer: str, message: Join) -> Reply:
        self.dispatch(events.Joined(self.job, message.role, message.member, peer))
        self.settle()
        answer = self.answers.pop(peer)
        if isinstance(answer, Refusal):
            raise answer
        assert isinstance(answer, Joined)
        self.docket.fact(
            Entered(
                answer.member,
                answer.incarnation,
                message.role,
                message.node,
                message.device,
                message.addresses,
            )
        )
        self.board.joined(message, answer, asyncio.get_running_loop().time())
        return answer, msgspec.msgpack.encode(self.spec)

    def admit(self, worker: str, incarnation: int) -> None:
        """Refuse a script whose incarnation is over."""
        if not self.is_current(worker, incarnation):
            raise Refusal(
                "fenced",
                f"{worker}#{incarnation} is not a member of generation {self.machine.generation(self.job)}",
            )

    async def register(self, peer: str, message: Register, registration: bytes) -> Reply:
        self.admit(message.worker, message.incarnation)
        self.docket.spoke(message.worker, peer)
        if digest_of(registration) != message.digest:
            raise Refusal("layout", "the layout's digest does not match its bytes")
        if not self.facts.registration:
            self.docket.fact(Shown(registration))
        self.dispatch(
            events.Registered(self.job, message.worker, message.incarnation, message.digest, message.chunks)
        )
        if message.digest != digest_of(self.facts.registration):
            raise Refusal("layout", f"{message.worker} registered another layout than the workers before it")
        self.settle()
        assert self.assigned is not None, "the machine places at the first registration"
        await asyncio.wait({self.assigned}, timeout=HOLD_S)
        if not self.assigned.done():  # the first sparse job of a machine compiles half a minute and more
            return self.wait(self.machine.shards(self.job), "they take the layout")
        if not await self.until(lambda: self.docket.loaded or self.facts.initialiser == message.worker):
            whom = self.facts.initialiser
            return self.wait([whom], f"{whom} brings the first parameters")
        shards = self.machine.shards(self.job)
        reply = Registered(
            job=self.job,
            generation=self.machine.generation(self.job),
            initialiser="" if self.docket.loaded else self.facts.initialiser,
            staleness=self.spec.staleness,
            compress=self.spec.compress,
            workers=self.spec.workers,
            epoch=self.ledger.epoch,
        )
        where = [self.facts.entered[shard].addresses for shard in shards]
        homes = Homes(list(shards), where, list(self.facts.placement))
        return reply, msgspec.msgpack.encode(homes)

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
            opened = self.docket.open(worker, message.epoch, message.batches, state)
            if not isinstance(opened, batches.Waiting):
                self.wake()
                break
            if not await self.pause(end):
                break
            self.admit(message.worker, message.incarnation)
        match opened:
            case batches.Opened():
                return EpochOpened(self.job, message.epoch, opened.first_clock), opened.token
            case batches.Drained():
                return Drained(self.job, opened.because)
            case batches.Mismatch():
                raise Refusal("epoch", opened.because)
        return self.wait(opened.waiting_for, opened.because)

    async def take(self, message: Take, done: memoryview | None) -> Reply:
        self.admit(message.worker, message.incarnation)
        worker = WorkerId(message.worker)
        self.docket.reached(message.epoch, message.clock)
        if done is not None:
            try:
                applied = msgspec.msgpack.decode(done, type=list[tuple[int, int]])
            except msgspec.MsgspecError as bad:
                raise Refusal("ledger", f"the batches that are applied cannot be read: {bad}") from None
            refused = self.docket.commit(worker, message.epoch, spread(applied, self.ledger.batches))
            if refused is not None:
                raise Refusal("ledger", refused.because)
            self.wake()
        end = asyncio.get_running_loop().time() + (HOLD_S if message.hold else 0.0)
        while True:
            taken = self.docket.take(worker, message.epoch, message.most, message.have)
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
