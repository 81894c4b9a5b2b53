"""The coordinator: events in, the machine decides, actions out.

It decides nothing itself: who is a member, who starts, who is fenced and how the job ends is `scheduler.machine`; which
worker computes which batch is `scheduler.batches`. Rules: every action is written to the run's events before it is
performed, with its reason; what has changed is in the journal before an order goes out or an answer is given, so that
another process goes on from there when this one dies (`docket`). While the journal has no room, nothing is changed.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from ..checkpoint import Checkpoint
from ..doctor.desk import ExamineDesk
from ..journal import Journal
from ..lease import NO_ROOM
from ..link import listen
from ..messages import (
    Ask,
    Claim,
    Claimed,
    Contents,
    Depart,
    Drain,
    Drained,
    Ended,
    Evaluate,
    Examine,
    Exited,
    Fenced,
    Fetch,
    FindStream,
    Gauge,
    Heartbeat,
    JobSpec,
    Join,
    Joined,
    Kept,
    Launch,
    Leave,
    Loaded,
    Message,
    Note,
    Ok,
    OpenEpoch,
    Piece,
    Probe,
    Register,
    Report,
    Returned,
    Skip,
    Standing,
    Status,
    StreamAt,
    Take,
    TakeCheckpoint,
    Vacate,
    Where,
)
from ..runs.events import EventLog
from ..scheduler import actions, calls, events
from ..scheduler.batches import Ledger
from ..scheduler.ids import JobId
from ..scheduler.machine import Machine
from ..status import JobStatus
from ..transport import Endpoint, Handler, Refusal
from .board import Board
from .checkpoint_desk import CheckpointDesk
from .checkpoints import begun_with, resumed_ledger, resumed_note
from .dealer import HOLD_S, Dealer
from .docket import Docket
from .endings import Endings
from .facts import Begun, Entered, Listening
from .heartbeats import Heartbeats
from .holds import Holds
from .homes import ShardHomes
from .notes import Notes
from .orders import Orders
from .rosters import Rosters
from .shard_desk import ShardDesk, digest_of
from .spreading import Spreading
from .streams import Streams
from .taking_over import take_over
from .vigil import Vigil

GRACE_S = (
    8.0  # for everybody to find a coordinator that was started again: they dial every second at the latest
)
LINGER_S = 3.0  # for those who do not know that the job is over to ask
ROOM_S = 0.5  # how often it is tried to write what the journal had no room for
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
        resumed: Checkpoint | None = None,
        slower: Callable[[], float] = lambda: 1.0,
    ) -> None:
        """Where the journal holds a job, that one goes on, as it was asked for then. `resumed`: what a job that begins
        begins with. `slower`: members are to be heard so many times seldomer than was asked for, now. Raises
        ZmlError."""
        self.docket = docket = Docket(job, machine, journal, asyncio.get_running_loop().time)
        begun = docket.facts.begun or Begun(
            job,
            spec,
            machine.rules.lease_s,
            heartbeat_s,
            time.time(),
            str(resumed.path) if resumed is not None else "",
            resumed.manifest.step if resumed is not None else 0,
            resumed.manifest.xxh3 if resumed is not None else "",
        )
        if begun.lease_s != machine.rules.lease_s:  # the members know the one that was set then
            most_s = max(machine.rules.lease_most_s, begun.lease_s)
            machine.rules = replace(machine.rules, lease_s=begun.lease_s, lease_most_s=most_s)
        self.begun = begun
        self.steps_before = begun.steps_before  # as people count them; of checkpoints it is the number
        self.job = docket.job
        self.spec = begun.spec
        self.machine = machine
        self.facts = docket.facts
        self.dealer = Dealer(self)
        self.events = event_log
        self.run_dir = run_dir
        self.endpoint: Endpoint = endpoint(self.handle)
        self.metrics = ""  # where it is scraped, and its dashboard is
        self.board = Board(self.spec, self.facts.failures)
        # member -> the endpoint that speaks for it, behind the docket's by the actions that are to be performed
        self.peers = dict(self.facts.peers)
        self.answers: dict[str, Message | Refusal] = {}  # peer -> how its Join ends; filled by `perform`
        self.notes = Notes(docket)
        self.streams = Streams(journal.folder if journal is not None else None)
        self.held: list[actions.Action] = []  # to be performed as soon as the journal has what led to them
        self.orders = Orders(self.endpoint, self.peers, self.is_still_to_come)
        going_on = docket.job in machine.jobs or docket.job in machine.over
        self.resumed: Checkpoint | None = begun_with(begun, resumed, going_on=going_on)
        self.shard_desk = ShardDesk(self, begun.begin_with, begun.manifest)
        self.homes = ShardHomes(
            self.job,
            docket,
            machine,
            self.orders.ask,
            self.dispatch,
            self.until,
            self.shard_desk.had_nothing,
        )
        self.rosters = Rosters(
            self.job,
            self.dealer,
            lambda: self.shard_desk.all,
            self.homes.settle,
            self.homes.bring,
            docket,
            lambda: self.shard_desk.asked(),
        )
        self.rosters.changed, self.rosters.written = self.wake, docket.settled
        self.holds = Holds(self.job, self.shard_desk.answered, self.facts.boots)
        self.spreading = Spreading(self)
        self.checkpoint_desk = CheckpointDesk(self)
        self.endings = Endings(self)
        self.examine_desk = ExamineDesk(self)
        self.changed = asyncio.Event()
        self.finished: asyncio.Future[int] | None = None
        self.heartbeats = Heartbeats(self, slower)
        self.interrupts = 0
        self.progress_at = -math.inf
        self.abandoned = False
        self.vigil = Vigil(lambda: self.endpoint.catch_up(), self._tick)

    @property
    def ledger(self) -> Ledger:
        return self.docket.ledger

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
            take_over(self)
        if not (self.job in self.machine.jobs or self.job in self.machine.over):
            asked = self.spec
            # Whoever was the coordinator before may have got no further than this.
            fresh = self.ledger.current is None
            if fresh and self.resumed is not None and (call := resumed_ledger(self.resumed)) is not None:
                self.dealer.perform(call)
            if self.resumed is not None:
                if (noted := resumed_note(self.resumed)) is not None:
                    self.docket.fact(noted)
                self.streams.begin_with(self.resumed)
            self.dispatch(
                events.Submitted(
                    self.job,
                    workers=asked.workers,
                    shards=asked.shards,
                    staleness=asked.staleness,
                    resumed=self.resumed is not None,
                    replicas=asked.replicas,
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
        await asyncio.gather(*self.orders.tasks, *self.under_way(), return_exceptions=True)
        await self.endpoint.close()
        self.events.close()
        if self.docket.journal is not None:
            self.docket.journal.close()

    def abandon(self) -> None:
        """Decide and order nothing more."""
        self.abandoned = True
        self.vigil.end()
        self.orders.cancel()
        for task in self.under_way():
            task.cancel()

    def under_way(self) -> list[asyncio.Task[Any]]:
        return [
            *self.rosters.tasks(),
            *self.homes.tasks,
            *self.spreading.tasks(),
            *self.checkpoint_desk.tasks(),
        ]

    # -- deciding and acting ---------------------------------------------------------------------------

    def dispatch(self, event: events.Event, unread_s: float = math.inf) -> None:
        """Hand an event to the machine and perform what it orders. The only place that does. Who is silent is found by
        `_tick` alone, which has read what has come."""
        decided: list[actions.Action] = []
        if isinstance(event, events.Renewed):  # heard at last, before its lease is looked at
            decided += self.docket.event(event)
            if not decided and self.vigil.is_set:
                return  # what time does is looked at in its time, which no heartbeat brings nearer
        # What time has done changes the state too: it has to wait while nothing can be written.
        while (
            self.docket.settled() and (finding := self.machine.finding(self.docket.now, unread_s)) is not None
        ):
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
        at = math.inf
        if not self.docket.settled():
            at = asyncio.get_running_loop().time() + ROOM_S
        elif (deadline := self.machine.next_deadline()) is not None:
            at = self.docket.by_clock(deadline)
        self.vigil.look_at(at)

    def _tick(self, unread_s: float) -> None:
        self.dispatch(events.Ticked(self.job), unread_s)

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def perform(self, action: actions.Action) -> None:
        """Carry out one action. Nothing here waits: what takes time becomes a task with a deadline."""
        match action:
            case actions.Admit():
                former = self.peers.get(action.member, action.peer)
                if former != action.peer and action.member in self.machine.shards(self.job):
                    self.endpoint.disconnect(former)  # an order that waits for its answer is not answered
                self.peers[action.member] = action.peer
                self.answers[action.peer] = Joined(
                    job=self.job,
                    member=action.member,
                    incarnation=action.incarnation,
                    generation=action.generation,
                    heartbeat_s=self.begun.heartbeat_s,
                    lease_s=self.begun.lease_s,
                    run_dir=self.run_dir,
                    serves=self.homes.served_by(action.member),
                )
            case actions.Refuse():
                self.answers[action.peer] = Refusal("refused", action.because)
            case actions.Announce():
                self.rosters.announce(action.generation, action.seats)
            case actions.Launch():
                self.orders.send(action.worker, Launch(self.job, action.worker, action.incarnation))
            case actions.Place():
                self.shard_desk.assign_all()
            case actions.Await():
                log.warning("waiting for a shard", shard=action.shard, because=action.because)
            case actions.Rehome():
                self.shard_desk.rehome(action.shard, action.incarnation)
            case actions.Grow():
                self.shard_desk.grow(action.shard)
                self.spreading.start()
            case actions.Promote() | actions.Adopt() | actions.Pair() | actions.Unpair():
                self.homes.perform(action)
            case actions.Fence():
                peer = self.peers.get(action.member, "")
                self.endpoint.notify(
                    peer, Fenced(self.job, action.member, action.incarnation, action.because)
                )
            case actions.Stop():
                self.checkpoint_desk.stop(action.member, action.because)
            case actions.Drain():
                self.dealer.perform(calls.Drain(action.because))
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

    # -- looking -------------------------------------------------------------------------------------

    def status(self) -> JobStatus:
        """What is going on, for whoever asks."""
        status = self.board.status(
            self.machine.jobs.get(self.job) or self.machine.over[self.job],
            self.ledger,
            asyncio.get_running_loop().time(),
        )
        return msgspec.structs.replace(
            status,
            events=list(self.events.recent),
            run_dir=self.run_dir,
            boots=self.facts.boots,
            metrics=self.metrics,
            checkpoint=self.checkpoint_desk.status(),
            registered=bool(self.facts.registration),
            steps_before=self.steps_before,
        )

    def changes(self) -> int:
        """Grows whenever the status may have become another one."""
        return self.board.changes + self.events.written

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
            self.heartbeats.take(peer, message)
            return None
        if isinstance(message, Probe | Examine):
            return self.examine_desk.handle(message)
        if isinstance(message, Report):
            self.admit(message.worker, message.incarnation)
            self.report(message)
            return None
        if isinstance(message, Gauge):
            if self.is_current(message.member, message.incarnation):
                self.board.gauge(message, self.events.note)
                self.dealer.stalls = self.board.stalls
            return None
        if isinstance(message, StreamAt):
            if self.is_current(message.worker, message.incarnation):
                self.streams.told(message, bytes(payload or b""))
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
                return self.endings.script(message)
            case Ended():
                return self.endings.process(message)
            case Leave():
                self.dispatch(events.Left(self.job, message.member, message.incarnation, message.because))
                return Ok()
            case Drain():
                self.dispatch(events.DrainAsked(self.job, message.because))
                return Ok()
            case Register():
                return self.shard_desk.register(peer, message, bytes(payload or b""))
            case Loaded():
                self.admit(message.worker, message.incarnation)
                self.dispatch(events.Loaded(self.job, message.worker, message.incarnation))
                return Ok()
            case Returned():
                holds = message.holds
                if not holds and self.shard_desk.had_nothing(message.shard):
                    holds = digest_of(self.facts.registration)
                self.homes.returned(message, holds)
                return Ok()
            case Standing():
                self.homes.standing(message)
                return Ok()
            case Vacate():
                return self.homes.vacate(message)
            case OpenEpoch():
                return self.dealer.open_epoch(message, bytes(payload or b""))
            case Note():
                self.admit(message.worker, message.incarnation)
                return self.notes.take(message, bytes(payload or b""))
            case Take():
                return self.dealer.take(message, payload)
            case Depart():
                return self.dealer.depart(message, self.machine.seats(self.job))
            case Evaluate():
                return self.dealer.evaluate(message, payload)
            case Contents():
                return self.dealer.know(message, bytes(payload or b""))
            case Skip():
                return self.dealer.skip(message, bytes(payload or b""))
            case FindStream():
                self.admit(message.worker, message.incarnation)
                return self.streams.find(message)
            case Where():
                self.admit(message.worker, message.incarnation)
                because = "it is gone, and its chunks are only there"
                found = self.shard_desk.where(message.shard, message.edition)
                return found or self.dealer.wait([message.shard], because)
            case TakeCheckpoint():
                return self.checkpoint_desk.take(message)
            case Piece() | Kept() | Fetch():
                return self.checkpoint_desk.files(message, payload)
            case Claim():
                self.admit(message.worker, message.incarnation)
                owner = self.docket.claim(message.what, message.worker)
                return Claimed(self.job, owner == message.worker, owner)
        raise Refusal("unexpected", f"a coordinator does not take {type(message).__name__}")

    def join(self, peer: str, message: Join) -> Reply:
        self.dispatch(events.Joined(self.job, message.role, message.member, peer, message.former))
        self.settle()
        answer = self.answers.pop(peer)
        if isinstance(answer, Refusal):
            raise answer
        assert isinstance(answer, Joined)
        every_s = self.heartbeats.begin(peer, answer.member, answer.incarnation)
        self.docket.fact(
            Entered(
                answer.member,
                answer.incarnation,
                message.role,
                message.node,
                message.device,
                message.addresses,
                message.pid,
                message.metrics,
            )
        )
        if message.role == "shard":
            self.homes.joined(answer.member)
        self.board.joined(message, answer, asyncio.get_running_loop().time())
        return msgspec.structs.replace(answer, every_s=every_s), msgspec.msgpack.encode(self.spec)

    def admit(self, worker: str, incarnation: int) -> None:
        """Refuse a script whose incarnation is over."""
        if not self.is_current(worker, incarnation):
            raise Refusal(
                "fenced",
                f"{worker}#{incarnation} is not a member of generation {self.machine.generation(self.job)}",
            )

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

    async def pause(self, end: float) -> bool:
        """Until something changes; False when `end` came first."""
        try:
            async with asyncio.timeout_at(end):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True
