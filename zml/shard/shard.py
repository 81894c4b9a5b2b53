"""A PS shard: it takes gradients, runs the optimizer on its chunks and publishes parameters.

Rules it keeps: a push counts at most once, whatever is resent; a step is applied whole or not at all; a worker that
the roster does not name changes nothing; a pull waits, at the shard and by name, for who is too slow. Whatever changes
the shard is checked first, then written to its log, then done, then answered: fed to a new shard, the log makes the
same one (`pushlog`).

A step counts on all shards or on none. A worker commits when every shard has acknowledged every push, so that a commit
seen anywhere means that all have the step staged. When a worker is lost, the coordinator asks every shard where it
stands (`Settle`), and with the next roster the others count what one of them has counted: a two-phase commit whose
second phase survives the one who began it (Gray, "Notes on Data Base Operating Systems", 1978).

Everything here runs in one thread, the bulk thread; `ps` puts a process around it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec import Struct

from ..checkpoint import Checkpoint
from ..checkpoint.folder import is_seen
from ..codec import BadFrame, by_name, split
from ..compression import parse
from ..hyper import NO_WISH, BadHyper, Hyper, read_hyper
from ..layout import Bucket, Registration, buckets
from ..messages import (
    Advance,
    Align,
    Assign,
    Cede,
    Commit,
    Enter,
    Entered,
    Finished,
    Graft,
    Held,
    Hold,
    Load,
    Mark,
    Message,
    Muster,
    Ok,
    Published,
    Pull,
    Push,
    Release,
    Roster,
    Seat,
    Settle,
    Snap,
    Snapped,
)
from ..records import NoRoom
from ..scheduler.ids import JobId, WorkerId
from ..scheduler.staleness import Gate
from ..tracing.shards import UNTRACED, Untraced
from ..transport import Refusal
from . import base, ceding, rostering
from .begin import CannotBegin, Sees, begin, read_assignment
from .counted import Committed, Last, Step, agreed
from .counts import Counts
from .covering import covered
from .doubt import Doubt
from .holding import Holding, Waiting, front_of, must_stand
from .marking import Marking, forget, mark
from .pace import Pace
from .pulling import Pulls, Reply
from .pushlog import Log, NoLog, PushLog
from .snapshot import Snapshot
from .store import Staged, Store

if TYPE_CHECKING:
    from .mirror import Mirror

# So long after a refusal a disk counts as full: whoever was refused has tried again by then.
NO_ROOM_S = 5.0

log = structlog.get_logger()


class Shard:
    """The shard's state and its two entries: `handle` for workers, `order` for the coordinator."""

    def __init__(self, job: JobId, name: str, log: Log | None = None) -> None:
        self.job = job
        self.name = name
        self.log = log or NoLog()
        self.mirror: Mirror | None = None  # feeds the backup
        self.replaying = False  # what comes is what came before: nobody is answered, nothing is written
        self.store: Store | None = None
        self.layout_digest = ""
        self.edition = 0  # of the placement
        self.doubt: Doubt | None = None
        self.cut: tuple[Bucket, ...] = ()  # all buckets
        self.buckets: dict[int, Bucket] = {}  # only those that live here
        self.pushed: frozenset[int] = (
            frozenset()
        )  # of them, those that are in every step: not the frozen ones
        self.seats: Sequence[Seat] = ()  # of the newest generation
        self.gate = Gate(0)
        self.generation = 0
        self.incarnations: dict[WorkerId, int] = {}  # exactly the workers of the roster
        self.peers: dict[WorkerId, str] = {}  # who speaks as this worker, bound by its Enter
        self.staged: dict[WorkerId, dict[int, Step]] = {}  # by clock; only clocks the gate has not finished
        self.committed: dict[int, dict[WorkerId, Committed]] = {}  # by clock; empty unless BSP
        self.fenced: dict[WorkerId, int] = {}  # incarnations in the roster that nothing is taken from
        self.last: dict[WorkerId, Last] = {}  # of the roster's workers
        self.applied: dict[WorkerId, Last] = {}  # in the parameters; also of former workers
        self.pulls = Pulls(self)
        self.hyper: list[Hyper] = []  # of the senior worker's last step
        self.hyper_bytes = b""  # the same, as they came
        self.setting = NO_WISH  # that all workers compress with next, where they find it together
        self.assigned: Assign | None = None  # the order that brought the chunks
        self.assignment = b""
        # What the order to come begins with, where it was looked for before.
        self.brought: Checkpoint | None = None
        self.sees: Sees = is_seen
        self.holding: Holding | None = None  # while a checkpoint is cut
        self.marking: Marking | None = None  # where it is cut without
        self.pace = Pace(name)
        self.trace: Untraced = UNTRACED
        self.copy: tuple[int, Snapshot] | None = None  # for the newest checkpoint, until it is written
        self.over = False  # it serves elsewhere: nothing counts or is answered here any more
        self.steps = 0
        self.counts = Counts()
        self.refused = -math.inf, ""  # for want of room: when last, and why

    # -- orders from the coordinator -----------------------------------------------------------------

    def order(self, message: Struct, payload: bytes | memoryview) -> Reply | Awaitable[Reply]:
        """One order. Raises Refusal, and then nothing has changed. Twice is the same as once."""
        self._must_live_here()
        match message:
            case Assign():
                registration, assignment = read_assignment(payload)
                if self.store is not None and assignment.edition > self.edition:
                    ceding.settle(self, message, payload, assignment)
                fresh = self.store is None
                if fresh:
                    ceding.may_begin(self, assignment)
                    self.note(message, payload)
                whose = (assignment.placement, message.staleness, message.compress)
                self.assign(registration, *whose, assignment.holders, assignment.edition)
                if fresh:
                    holders = len(set(assignment.holders or assignment.placement))
                    self.pace.begin(message.rates, message.course, noise=message.noise, holders=holders)
                if fresh and message.checkpoint:
                    self._begin_with(message, payload)
                if assignment.edition == self.edition:
                    self.assigned, self.assignment = message, bytes(payload)
                return Ok()
            case Cede():
                return ceding.cede(self, message, payload)
            case Graft():
                return ceding.graft(self, message, payload)
            case Roster():
                try:
                    muster = msgspec.msgpack.decode(payload, type=Muster)
                except msgspec.MsgspecError as bad:
                    raise Refusal("roster", f"the roster cannot be read: {bad}") from None
                if message.generation >= self.generation:
                    self.note(message, payload)
                    self.roster(message.generation, muster.seats, muster.finished)
                return Ok()
            case Settle():
                return rostering.settle(self, message)
            case Mark():
                return mark(self, message)
            case Hold():
                forget(self)
                if self.store is None or not self.store.ready:
                    raise Refusal("checkpoint", f"{self.name} has no parameters yet")
                if self.doubt is not None:
                    raise self.doubt.undecided(self.name)
                if self.holding is None or self.holding.checkpoint != message.checkpoint:
                    self._release()
                    self.holding = Holding(self, message.checkpoint, self._go)
                return Held(), msgspec.msgpack.encode(front_of(self))
            case Align():
                counted, stands = msgspec.msgpack.decode(payload, type=tuple[dict[str, int], dict[str, int]])
                self.held(message.checkpoint).align(counted, stands)
                return Held(), msgspec.msgpack.encode(front_of(self))
            case Snap():
                holding = self.held(message.checkpoint)
                must_stand(self, payload)
                snapshot = self._store().snapshot(published=False)
                self.copy = (message.checkpoint, snapshot)
                held_s = time.perf_counter() - holding.began
                self._release()
                return Snapped(snapshot.bytes, held_s)
            case Release():
                if self.marking is not None and self.marking.order.checkpoint == message.checkpoint:
                    forget(self)
                if self.holding is not None and self.holding.checkpoint == message.checkpoint:
                    self._release()
                return Ok()
        raise Refusal("unexpected", f"a shard does not take {type(message).__name__}")

    def recover(self, log: PushLog) -> int:
        """Become what a former process was, from its log; returns how many messages that took. Raises Damaged."""
        start = 0
        if (found := log.base()) is not None:
            start, state = found
            base.become(self, state)
        count = 0
        for message, payload in log.replay(start):
            self.replay(message, payload)
            count += 1
        return count

    def replay(self, message: Struct, payload: memoryview) -> None:
        """One record of the log."""
        self.replaying, counts, self.counts = True, self.counts, Counts(dense=self.counts.dense)
        try:
            match message:
                case Assign() | Roster() | Settle() | Cede() | Graft():
                    self.order(message, payload)
                case Published():
                    store, bucket = self.bucket(message.bucket)
                    store.publish_bucket(bucket.chunks)
                case Enter() | Push() | Commit() | Advance() | Load():
                    self._take(WorkerId(message.worker), message, payload)
                case _:
                    raise AssertionError(f"{type(message).__name__} changes nothing, and is in the log")
        finally:
            self.replaying, self.counts = False, counts

    def end(self) -> None:
        """It serves elsewhere, with all that it ever said here: who waits or comes is told so. What is
        held back for a checkpoint must not count here now, and be acknowledged: nobody would have it."""
        self.over = True
        if (doubt := self.doubt) is not None:
            self.doubt = None
            doubt.end()
        self._release()
        self.pulls.refuse(self._moved())

    def _must_live_here(self) -> None:
        if self.over:
            raise self._moved()

    def _moved(self) -> Refusal:
        return Refusal("moved", f"{self.name} lives in another process")

    def held(self, checkpoint: int) -> Holding:
        holding = self.holding
        if self.doubt is not None:
            raise self.doubt.undecided(self.name)
        if holding is None or holding.over or holding.checkpoint != checkpoint:
            raise Refusal(
                "checkpoint",
                f"{self.name} goes on already: what was to come with hold {checkpoint} came too late",
            )
        return holding

    def _release(self) -> None:
        if self.doubt is not None:
            return  # what waits, waits for its end
        holding, self.holding = self.holding, None
        if holding is not None:
            holding.release()

    def _go(self, waiting: Waiting) -> Reply:
        """A message whose time has come: it may have lost its right to count meanwhile."""
        worker = self._admit(waiting.peer, waiting.message)
        return self._take(worker, waiting.message, waiting.payload)

    def _begin_with(self, message: Assign, payload: bytes | memoryview) -> None:
        """Begin with what a checkpoint has of these chunks, whoever wrote it. Raises CannotBegin."""
        brought, self.brought = self.brought, None
        try:
            begin(self._store(), self.name, message, payload, brought, self.sees)
        except CannotBegin:
            self.store, self.layout_digest = None, ""
            raise

    def note(self, message: Message, payload: bytes | memoryview | None = None) -> None:
        """To the log, before it is done. Refusal where there is no room: then it is not done."""
        if self.replaying:
            return
        try:
            self.log.append(message, payload)
        except NoRoom as full:
            if not self.no_room:
                log.error("disk full", shard=self.name, folder=full.filename)
            because = f"{self.name} has no room for its push log in {full.filename}"
            self.refused = time.monotonic(), because
            raise Refusal("full", because) from None
        if self.mirror is not None:
            self.mirror.append(message, payload)

    @property
    def no_room(self) -> str:
        """Why what comes is refused at present; empty where it is not, as far as anybody has tried."""
        at, because = self.refused
        return because if time.monotonic() - at < NO_ROOM_S else ""

    def assign(
        self,
        registration: Registration,
        placement: Sequence[int],
        staleness: int | None,
        compress: str,
        holders: Sequence[int] = (),
        edition: int = 0,
    ) -> None:
        """Take on a job's chunks. Twice is the same as once; another layout is refused."""
        if self.store is not None:
            if registration.digest != self.layout_digest:
                raise Refusal("layout", f"{self.name} already holds another layout")
            return
        me = int(self.name[1:])
        self.cut = buckets(registration.layout, placement, registration.bucket_chunks)
        holders = holders or [bucket.shard for bucket in self.cut]
        mine = [bucket for bucket in self.cut if holders[bucket.index] == me]
        self.edition = edition
        chunks = [chunk for bucket in mine for chunk in bucket.chunks]
        asked = parse(compress)
        self.store = Store(
            registration.layout,
            chunks,
            registration.optimizer,
            by_name(str(asked.coded)),
            follow=asked.kind == "auto",
        )
        self.layout_digest = registration.digest
        self.hold_buckets(mine)
        self.gate = Gate(staleness)
        self.gate.roster(self.seats)

    def hold_buckets(self, held: Iterable[Bucket]) -> None:
        """These live here now."""
        self.buckets = {bucket.index: bucket for bucket in held}
        self.pushed = frozenset(index for index, bucket in self.buckets.items() if not bucket.frozen)
        self.counts.begin(self._store().layout, self.buckets)

    def meet_again(self, because: Refusal) -> None:
        """Nobody is known here before entering again: whoever waits is told."""
        self.peers.clear()
        self.pulls.refuse(because)
        self._release()

    def ceded(self, bucket: int) -> Doubt | None:
        """Is nothing to be done with this bucket, until a doubt is over?"""
        doubt = self.doubt
        return doubt if doubt is not None and doubt.gives and bucket in doubt.buckets else None

    def roster(self, generation: int, seats: Sequence[Seat], finished: Sequence[Finished] = ()) -> None:
        """The workers of a generation. An older generation than the one known is ignored."""
        if generation < self.generation:
            return
        for step in finished:
            rostering.finish(self, step)
        self.generation = generation
        rostering.muster(self, seats)
        self._go_on()

    # -- messages from workers ---------------------------------------------------------------------------

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
        """One message from a worker. Raises Refusal, and then nothing has changed."""
        try:
            return self._handle(peer, message, payload)
        except Refusal:
            self.counts.refused += isinstance(message, Push | Commit)
            raise

    def _handle(self, peer: str, message: Struct, payload: memoryview | None) -> Reply | Awaitable[Reply]:
        match message:
            case Push() | Pull() if (doubt := self.ceded(message.bucket)) is not None:
                self._admit(peer, message)
                return doubt.wait(self.name)
            case Pull():
                return covered(self, self.pulls.pull(self._admit(peer, message), message))
            case Enter() | Commit() | Advance() if (holding := self._holding_up()) is not None:
                self._admit(peer, message)
                return covered(self, holding.wait(peer, message, payload))
            case Enter() | Push() | Commit() | Advance() | Load():
                return covered(self, self._take(self._admit(peer, message), message, payload))
        raise Refusal("unexpected", f"a shard does not take {type(message).__name__}")

    def _holding_up(self) -> Holding | None:
        """Where what would count is to wait."""
        holding = self.holding
        if self.doubt is not None and (
            holding is None or holding.over
        ):  # it was a former process', or took long
            self.holding = Holding(self, 0, self._go)
            self.holding.stay()
        return self.holding if self.holding is not None and not self.holding.over else None

    def _take(
        self, worker: WorkerId, message: Enter | Push | Commit | Advance | Load, payload: memoryview | None
    ) -> Reply:
        """What changes the shard, from a worker that may: now, or once more from the log."""
        match message:
            case Enter():
                return self._enter(worker, message)
            case Push():
                return self._push(worker, message, payload)
            case Commit():
                return self._commit(worker, message, payload)
            case Advance():
                return self._advance(worker, message)
            case Load():
                return self._load(worker, message, payload)

    def _admit(self, peer: str, message: Enter | Push | Commit | Pull | Advance | Load) -> WorkerId:
        """The worker this message speaks for, if the roster names it with this incarnation."""
        self._must_live_here()
        worker = WorkerId(message.worker)
        if message.job != self.job:
            raise Refusal("job", f"{self.name} serves job {self.job}, not {message.job}")
        if self.store is None:
            raise Refusal("early", f"{self.name} has no layout yet")
        known = self.incarnations.get(worker)
        if known is None or message.incarnation > known:
            raise Refusal(
                "early", f"generation {self.generation} does not name {worker}#{message.incarnation}"
            )
        if message.incarnation < known:
            raise Refusal(
                "fenced", f"{worker}#{message.incarnation} is over: {worker}#{known} took its place"
            )
        if self.fenced.get(worker) == message.incarnation:
            raise Refusal("fenced", f"{worker}#{message.incarnation} is over: it was lost")
        if not isinstance(message, Enter):
            if self.peers.get(worker) != peer:
                raise Refusal("identity", f"{peer} has not entered as {worker}")
        elif message.edition != self.edition:
            code = "moved" if message.edition < self.edition else "early"
            raise Refusal(code, f"{self.name} has edition {self.edition} of the placement")
        elif self.peers.setdefault(worker, peer) != peer:
            raise Refusal("identity", f"another process already speaks as {worker}#{message.incarnation}")
        return worker

    def _enter(self, worker: WorkerId, message: Enter) -> Reply:
        if message.known and worker in self.gate.active:
            return Entered(self.gate.frontier(worker))
        self.note(message)
        return Entered(self.gate.enter(worker))

    def _load(self, worker: WorkerId, message: Load, payload: memoryview | None) -> Reply:
        store, bucket = self.bucket(message.bucket)
        if not store.ready:
            try:
                store.check_load(bucket.chunks, payload or b"")
                self.note(message, payload)
                store.load_bucket(bucket.chunks, payload or b"")
            except BadFrame as bad:
                raise Refusal("frame", str(bad)) from None
            if store.ready:
                log.info("parameters are here", shard=self.name, worker=worker, chunks=len(store.chunks))
                self._go_on()
        return Ok()

    def _push(self, worker: WorkerId, message: Push, payload: memoryview | None) -> Reply:
        store, bucket = self.bucket(message.bucket)
        if message.clock < self.gate.frontier(worker):
            self.counts.duplicates += 1
            return Ok()  # resent after its step was committed
        self._check_clock(worker, message.clock)
        if bucket.index not in self.pushed:
            raise Refusal("frozen", f"the parameters of bucket {bucket.index} are frozen")
        try:
            frames = split(payload or memoryview(b""), bucket.chunks)
            staged = Staged(frames, frozenset(message.absent), message.seen)
            store.check(staged)
        except BadFrame as bad:
            raise Refusal("frame", str(bad)) from None
        self.note(message, payload)
        self.counts.pushed(bucket.index, payload)
        step = self.staged.setdefault(worker, {}).setdefault(message.clock, Step())
        step.pushes[bucket.index] = staged  # the last one before the commit counts
        self.trace.pushed(worker, message.clock, len(payload or b""))
        return Ok()

    def _commit(self, worker: WorkerId, message: Commit, payload: memoryview | None) -> Reply:
        store, clock = self._store(), message.clock
        if clock < self.gate.frontier(worker):
            self.counts.duplicates += 1
            return Ok()
        self._check_clock(worker, clock)
        step = self.staged.get(worker, {}).get(clock, Step())
        if message.buckets != len(self.pushed) or step.pushes.keys() != self.pushed:
            raise Refusal(
                "incomplete", f"{len(step.pushes)} of {len(self.pushed)} buckets of clock {clock} are here"
            )
        try:
            hyper = read_hyper(payload or memoryview(b""), store.spec)
        except BadHyper as bad:
            raise Refusal("hyper", str(bad)) from None
        try:
            store.check_step([step.pushes[index] for index in sorted(step.pushes)])
        except BadFrame as bad:
            raise Refusal("frame", str(bad)) from None
        # Up to here nothing has changed; from here on the step counts.
        self.note(message, payload)
        self.counts.taken += 1
        last = Last(clock, message.epoch, message.done, bytes(payload or b""), message.incarnation)
        with self.trace.counting(worker, clock, message.trace, len(self.pushed)):
            self.count(worker, step, hyper, last)
        return Ok()

    def count(self, worker: WorkerId, step: Step, hyper: list[Hyper], last: Last) -> None:
        """A whole step counts from now on."""
        clock, pushes = last.clock, [step.pushes[index] for index in sorted(step.pushes)]
        staged = self.staged.get(worker, {})
        self.staged[worker] = {later: kept for later, kept in staged.items() if later > clock}
        if not self.hyper or worker == self.gate.senior():
            self.hyper, self.hyper_bytes = hyper, last.hyper
        self.last[worker] = last
        self.gate.finish(worker, clock)
        if self.gate.bound == 0:
            self.committed.setdefault(clock, {})[worker] = Committed(pushes, hyper, last)
        else:
            store = self._store()
            with self.counts.applying(), self.trace.applying(clock, [worker]):
                # Where each worker finds its own setting, how its update is merged follows from that.
                self.pace.alone(store, pushes, hyper if store.follow else self.hyper)
            self.applied[worker] = last
            if not self.replaying:
                self.pace.observe(worker, last.epoch, len(self.gate.active))
            self.steps += 1
        self._go_on()

    def _check_clock(self, worker: WorkerId, clock: int) -> None:
        # One step of each worker is staged, so that what a peer can fill is bounded by the model.
        if clock != (stands := self.gate.frontier(worker)):
            raise Refusal("clock", f"{worker} stands at clock {stands}, and sends clock {clock}")

    def _advance(self, worker: WorkerId, message: Advance) -> Reply:
        if message.clock > self.gate.frontier(worker):
            self.note(message)
            self.gate.advance(worker, message.clock)
            self._go_on()
        return Ok()

    # -- going on ----------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """After any change of the gate: apply the clocks that are complete, answer the pulls that may go."""
        if self.store is None:
            return
        for clock in sorted(self.committed):
            low = self.gate.low
            if low is not None and clock >= low:
                break
            if self.marking is not None:
                self.marking.before(clock)
            self._apply_clock(clock)
        if self.marking is not None:
            self.marking.look()
        self.pulls.go_on()

    def _apply_clock(self, clock: int) -> None:
        """The mean of a clock's steps, summed in order of seniority: the same bits in every run."""
        steps = self.committed.pop(clock)
        order = self.gate.in_seniority(steps)
        with self.counts.applying(), self.trace.applying(clock, order):
            epoch = self.pace.together(self._store(), clock, {worker: steps[worker] for worker in order})
        self.applied.update({worker: steps[worker].last for worker in order})
        self.agree()
        if not self.replaying:
            self.pace.observe("", epoch, len(order))
        self.steps += 1

    def agree(self) -> None:
        """What is in the parameters has changed."""
        if self.gate.bound == 0 and self.store is not None and self.store.follow:
            self.setting = agreed(self.applied.values())

    def _store(self) -> Store:
        assert self.store is not None, "_admit lets nothing in before assign"
        return self.store

    def bucket(self, index: int) -> tuple[Store, Bucket]:
        bucket = self.buckets.get(index)
        if bucket is None:
            raise Refusal("placement", f"bucket {index} does not live on {self.name}")
        return self._store(), bucket
