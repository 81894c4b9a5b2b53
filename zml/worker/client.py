"""One worker's conversation with the coordinator and the shards; asyncio, no torch.

Rules it keeps: a step is committed when every bucket of it is there, on every shard; whoever is waited for is named; a
refusal or a silence becomes an error that says what to do. A shard that was lost is looked for until it is back, and
what it has not acknowledged is sent again: everything a worker says to a shard may be said twice. Buckets may move to a
shard that joins: those that held some refuse whoever has not looked since, and so everybody looks.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from ..agent.seat import Seat
from ..errors import EPOCH_DIFFERS, EVALUATION, FENCED, LAYOUT_DIFFERS, LOST, REFUSED, ZmlError
from ..intervals import intervals
from ..layout import Bucket
from ..lease import COORDINATOR, worth_asking_again
from ..messages import (
    Advance,
    Claim,
    Claimed,
    Commit,
    Contents,
    Delta,
    Depart,
    Departed,
    Drained,
    Enter,
    Entered,
    EpochOpened,
    EpochOver,
    Evaluate,
    Evaluating,
    Fetch,
    FindStream,
    Homes,
    Kept,
    Load,
    Loaded,
    Message,
    Note,
    OpenEpoch,
    Piece,
    Pull,
    Push,
    Register,
    Registered,
    Report,
    Result,
    Skip,
    StreamAt,
    StreamFound,
    Take,
    Taken,
    Totals,
    Wait,
)
from ..piecewise import PIECE_S
from ..scheduler.evaluation import Key
from ..tracing.steps import UNTRACED, Untraced
from ..transport import Answer, DeadlineExceeded, Endpoint, PeerLost, Refused
from .whereabouts import FULL, RETRY_S, UNMET, Whereabouts

REPLY_S = 30.0  # no member needs longer to answer, unless it is gone
ASK_S = 5.0  # for the coordinator; it is asked again then
AWAY = "the coordinator"
LATER = ("early", FULL)  # refusals that mean: ask again
FULL_S = 1.0  # before that one is told again
ELSEWHERE = ("identity", "moved")  # and: look for it again
MOST_SAMPLES = 1_000  # of a bad batch that are told
MOST_WORDS = 500  # characters, of why it is left out
PULLS_AT_ONCE = 16
# Per shard: a model of any size leaves within deadlines that count from each bucket's own start.
PUSHES_AT_ONCE = 16

log = structlog.get_logger()
Deliver = Callable[[Bucket, Delta, memoryview | None], None]
Wanted = Sequence[tuple[Bucket, list[int]]]  # buckets, each with the versions held
Progress = tuple[
    int, int
]  # an epoch, and how many of the batches given to this worker in it are in its steps
Enough = Callable[[], object]  # true once there is no sense in waiting any longer


def never() -> bool:
    return False


class Overtaken(Exception):
    """The placement has another edition than this was said for."""


class Leaving:
    """A step on its way: its pushes, and whether each shard has counted it."""

    def __init__(self) -> None:
        self.pushes: dict[int, asyncio.Task[None]] = {}  # by bucket, the newest of each
        self.twice = False  # a bucket was pushed again, and that one waits for the one before it
        self.counted: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by shard
        self.committing = False  # what is pushed and never committed, after a rest, is waited for by nobody
        self.over = False


class Client:
    """Control goes over one endpoint, bulk over the other, so that neither waits behind the other."""

    def __init__(self, seat: Seat, control: Endpoint, bulk: Endpoint) -> None:
        self.seat = seat
        self.control = control
        self.bulk = bulk
        self.where = Whereabouts(seat, bulk, self._ask, self._waiting, self._spare)
        self.leaving: dict[int, Leaving] = {}  # by clock; two where one is pushed before the last one counts
        self.pull_slots = asyncio.Semaphore(PULLS_AT_ONCE)
        # By shard; first come, first served.
        self.push_slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(PUSHES_AT_ONCE)
        )
        self.samples = 0  # of all reports
        self.reached = (-1, 0)  # an epoch, and how many batches of it have come
        self.note = b""  # the senior worker's on its schedules, as it was when this worker registered
        self.trace: Untraced = UNTRACED
        self.waits: dict[str, float] = {}  # reason -> since when, in the loop's time
        self.spared = 0  # how often a wait was seen that uses up nobody's patience
        self.spared_at = -math.inf  # and when last
        self.moved = 0  # the newest that a Wait has told

    @property
    def me(self) -> dict[str, Any]:
        return self.where.me

    # -- coordinator -------------------------------------------------------------------------------------

    async def register(
        self, registration: bytes, digest: str, chunks: int, enough: Enough = never
    ) -> tuple[Registered, list[int]] | None:
        """Show the layout; returns where each chunk lives (index of its shard) once every shard has the layout.

        None if `enough` came to hold before.
        """
        answer = await self._settled(
            lambda: self._ask(Register(digest=digest, chunks=chunks, **self.me), registration),
            Registered,
            code=LAYOUT_DIFFERS,
            enough=enough,
        )
        if answer is None:
            return None
        registered = answer.message
        assert isinstance(registered, Registered)
        homes = msgspec.msgpack.decode(bytes(answer.payload or b""), type=Homes)
        self.note = homes.note
        await self.where.meet_all(homes)
        return registered, homes.placement

    async def open_epoch(
        self,
        epoch: int,
        batches: int,
        state: bytes,
        samples: int = 0,
        batch_size: int = 0,
        enough: Enough = never,
    ) -> tuple[EpochOpened, bytes] | None:
        """All workers begin the epoch; returns its first clock and the senior's generator state.

        None when the job is drained, or if `enough` came to hold before.
        """
        message = OpenEpoch(epoch=epoch, batches=batches, samples=samples, batch_size=batch_size, **self.me)
        answer = await self._settled(
            lambda: self._ask(message, state), EpochOpened, Drained, code=EPOCH_DIFFERS, enough=enough
        )
        if answer is not None and isinstance(answer.message, EpochOpened):
            return answer.message, bytes(answer.payload or b"")
        return None

    async def tell_note(self, epoch: int, note: bytes) -> None:
        await self._ask(Note(epoch=epoch, **self.me), note)

    async def of_checkpoint(self, message: Piece | Kept | Fetch, payload: Any = None) -> Answer:
        return await self._ask(message, payload, PIECE_S if isinstance(message, Piece) else ASK_S)

    async def take(
        self, epoch: int, clock: int, most: int, done: Sequence[int], *, hold: bool
    ) -> Taken | Wait | EpochOver | Drained:
        """Ask once, standing at `clock`; `done` are the batches applied since the last call."""
        have = self.reached[1] if self.reached[0] == epoch else 0
        message = Take(epoch=epoch, clock=clock, most=most, have=have, hold=hold, **self.me)
        payload = msgspec.msgpack.encode(intervals(done)) if done else None
        reply = (await self._ask(message, payload)).message
        assert isinstance(reply, Taken | Wait | EpochOver | Drained), reply
        if isinstance(reply, Taken):
            self.reached = (epoch, have + len(reply.batches))
        return reply

    async def evaluate(
        self,
        key: Key,
        batches: int,
        attempt: str,
        results: Sequence[Result],
        holds: Sequence[int],
        *,
        hold: bool,
    ) -> Evaluating | Wait | dict[str, float]:
        """Hand in results and ask for batches; with `hold` until there are some, or the totals."""
        until = asyncio.get_running_loop().time() + self.seat.patience_s
        payload = msgspec.msgpack.encode(results) if results else None
        message = Evaluate(
            epoch=key.epoch,
            number=key.number,
            batches=batches,
            attempt=attempt,
            holds=list(holds),
            hold=hold,
            **self.me,
        )
        while True:
            try:
                answer = await self._ask(message, payload)
            except Refused as refused:
                raise ZmlError(EVALUATION, f"{refused.peer} refused: {refused.because}") from refused
            match answer.message:
                case Totals():
                    return msgspec.msgpack.decode(bytes(answer.payload or b""), type=dict[str, float])
                case Wait() if hold:
                    self._waiting(answer.message, until)
                    payload = None
                case Evaluating() | Wait():
                    self.waits.clear()
                    return answer.message
                case other:
                    raise AssertionError(other)

    async def tell_contents(self, epoch: int, batch: int, samples: Sequence[int]) -> None:
        """Say what is in a batch that scripts have crashed over, before this one does."""
        payload = msgspec.msgpack.encode(list(samples[:MOST_SAMPLES]))
        await self._say(Contents(epoch=epoch, batch=batch, **self.me), payload)

    async def skip(self, epoch: int, batch: int, because: str, samples: Sequence[int]) -> None:
        payload = msgspec.msgpack.encode(list(samples[:MOST_SAMPLES]))
        because = because[:MOST_WORDS]
        await self._say(Skip(epoch=epoch, batch=batch, because=because, **self.me), payload)

    def tell_state(self, part: int, position: int, state: bytes) -> None:
        """Of a stream. A notice; lost when the coordinator is away, and not missed."""
        self.control.notify(COORDINATOR, StreamAt(part=part, position=position, **self.me), state)

    async def find_state(self, part: int, position: int) -> tuple[int, bytes] | None:
        """The nearest that is kept, at this position or before it."""
        answer = await self._ask(FindStream(part=part, position=position, **self.me))
        assert isinstance(answer.message, StreamFound), answer.message
        return None if answer.payload is None else (answer.message.position, bytes(answer.payload))

    async def claim(self, what: str) -> Claimed:
        reply = (await self._ask(Claim(what=what, **self.me))).message
        assert isinstance(reply, Claimed), reply
        return reply

    async def depart(self) -> bool:
        """The last word of a worker that leaves; whether it is the last of them."""
        reply = (await self._ask(Depart(**self.me))).message
        assert isinstance(reply, Departed), reply
        return reply.last

    async def loaded(self) -> None:
        await self._ask(Loaded(**self.me))

    def report(self, *, samples: int = 0, **fields: Any) -> None:
        """A notice, of `samples` more than in the one before. Lost when the coordinator is away, and not missed."""
        self.samples += samples
        self.control.notify(COORDINATOR, Report(samples=self.samples, **fields, **self.me))

    # -- shards ----------------------------------------------------------------------------------------------

    async def enter(self, at_least: int = 0) -> int:
        """Be waited for by every shard. Returns the clock from which on all of them wait for this worker.

        Each shard lets the worker in at its own slowest clock; the greatest of them is where it starts, and the
        others are told that nothing comes before it. `at_least`: clocks below were used by this worker before.
        """
        clocks = [at_least]

        async def enter(shard: str) -> None:
            clocks.append(await self._enter_at(shard))

        await self._everywhere(enter)
        clock = max(clocks)
        await self.advance(clock)
        return clock

    async def _enter_at(self, shard: str) -> int:
        def enter(shard: str) -> Message:
            return Enter(edition=self.where.edition, **self.me)

        answer = await self._settled(lambda: self._tell(lambda: shard, enter), Entered)
        assert answer is not None and isinstance(answer.message, Entered)
        return answer.message.clock

    async def advance(self, clock: int) -> None:
        """Rest until `clock`: nobody waits for this worker below it."""
        message = Advance(clock=clock, **self.me)

        async def tell(shard: str) -> None:
            await self._counted_before(clock, shard)
            await self._tell(lambda: shard, lambda _: message)

        await self._everywhere(tell)

    async def _everywhere(
        self, tell: Callable[[str], Coroutine[Any, Any, object]], told: Collection[str] = ()
    ) -> None:
        """On every shard, but those that have been `told`, and also on one that comes to hold something meanwhile."""
        done = set(told)
        while left := [shard for shard in self.where.shards if shard not in done]:
            await asyncio.gather(*(tell(shard) for shard in left))
            done.update(left)

    async def load(self, bucket: Bucket, payload: memoryview) -> None:
        """Bring the first parameters of one bucket."""
        message = Load(bucket=bucket.index, **self.me)
        await self._tell(lambda: self.where.holder(bucket), lambda _: message, payload)

    def push(
        self, bucket: Bucket, clock: int, payload: memoryview, absent: list[int], seen: int = -1
    ) -> None:
        """Let one bucket of a step leave. The payload must stay as it is until `commit` has returned."""
        self.trace.pushing(clock, self.where.holder(bucket), len(payload))
        message = Push(clock=clock, bucket=bucket.index, absent=absent, seen=seen, **self.me)
        leaving = self.leaving.setdefault(clock, Leaving())
        former = leaving.pushes.get(bucket.index)
        leaving.twice |= former is not None
        task = asyncio.ensure_future(self._push(bucket, message, payload, former))
        # `commit` raises it, if it comes.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        leaving.pushes[bucket.index] = task

    async def _push(
        self, bucket: Bucket, message: Push, payload: memoryview, former: asyncio.Task[None] | None
    ) -> None:
        # The last one counts: one that has to be sent again must not overtake it.
        if former is not None:
            await asyncio.wait([former])
        while True:
            shard = self.where.holder(bucket)
            await self._counted_before(message.clock, shard)
            if self.where.holder(bucket) == shard:
                break
        async with self.push_slots[shard]:
            await self._tell(lambda: self.where.holder(bucket), lambda _: message, payload)

    async def _counted_before(self, clock: int, shard: str) -> None:
        """A shard stages and counts one step of a worker at a time."""
        for earlier, before in list(self.leaving.items()):
            if earlier < clock and before.committing and not before.over:
                await before.counted[shard].wait()

    def commit(
        self, clock: int, hyper: bytes, buckets: Sequence[Bucket], progress: Progress = (-1, 0)
    ) -> Coroutine[Any, Any, None]:
        """Make the step count, on all shards or, if this worker is lost meanwhile, on all or none (see `shard.shard`).

        From this call on, and not from when it is awaited first, pushes of later clocks wait for it.
        """
        leaving = self.leaving.setdefault(clock, Leaving())
        leaving.committing = True
        epoch, done = progress

        def commit(shard: str) -> Message:
            return Commit(
                clock=clock,
                buckets=sum(self.where.holder(bucket) == shard for bucket in buckets),
                epoch=epoch,
                done=done,
                trace=self.trace.committing(clock, shard, epoch),
                **self.me,
            )

        return self._commit_all(leaving, clock, commit, memoryview(hyper))

    async def _commit_all(
        self, leaving: Leaving, clock: int, commit: Callable[[str], Message], hyper: memoryview
    ) -> None:
        pushes = list(leaving.pushes.values())
        told: list[str] = []

        async def tell(shard: str) -> None:
            # Where it has nothing of the model that is trained no push has waited, nor anybody for its parameters.
            await self._counted_before(clock, shard)
            await self._tell(lambda: shard, commit, hyper)
            self.trace.counted(clock, shard)
            leaving.counted[shard].set()

        try:
            # One shard may be told right behind the pushes, which saves a round trip.
            if len(self.where.shards) == 1 and len(pushes) <= PUSHES_AT_ONCE and not leaving.twice:
                told = await self._commit_behind(self.where.shards[0], clock, commit, hyper)
            await asyncio.gather(*pushes)
            # So no shard is more than one step behind another, also one that is pushed to none: if this worker is lost
            # now, they can be brought to count the same.
            for shard in list(self.where.shards):
                await self._counted_before(clock, shard)
            await self._everywhere(tell, told)
        finally:
            leaving.over = True
            for event in leaving.counted.values():
                event.set()  # also after a failure, which ends the script: nobody waits for ever
            self.leaving = {later: kept for later, kept in self.leaving.items() if later > clock}

    async def _commit_behind(
        self, shard: str, clock: int, commit: Callable[[str], Message], hyper: memoryview
    ) -> list[str]:
        """Who was told: nobody, if one of the pushes had to be sent again or has gone elsewhere."""
        edition = self.where.edition

        def unless_overtaken(shard: str) -> Message:
            if self.where.edition != edition:  # not all of the pushes may be there yet
                raise Overtaken
            return commit(shard)

        try:
            await self._tell(lambda: shard, unless_overtaken, hyper)
        except Overtaken:
            return []
        except Refused as refused:
            if refused.code != "incomplete":
                raise
            return []
        self.trace.counted(clock, shard)
        return [shard]

    async def pull_all(self, wanted: Wanted, clock: int, deliver: Deliver, step: int | None = None) -> None:
        """Get buckets, new enough to start `clock`, in this order. `step`: the clock that this is part of, if any."""
        await asyncio.gather(*(self._pull(bucket, clock, have, deliver, step) for bucket, have in wanted))

    async def _pull(
        self, bucket: Bucket, clock: int, have: list[int], deliver: Deliver, step: int | None
    ) -> None:
        """Waits as long as members are alive to be waited for."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.seat.patience_s
        header = self.trace.pulling(step, self.where.holder(bucket))
        message = Pull(clock=clock, bucket=bucket.index, have=have, trace=header, **self.me)
        while True:
            async with self.pull_slots:
                answer = await self._tell(lambda: self.where.holder(bucket), lambda _: message)
            if isinstance(answer.message, Delta):
                self.waits.clear()
                self.trace.pulled(step, self.where.holder(bucket), len(answer.payload or b""))
                deliver(bucket, answer.message, answer.payload)
                return
            assert isinstance(answer.message, Wait), answer.message
            self.trace.waiting(step, self.where.holder(bucket), answer.message.waiting_for)
            self._waiting(answer.message, until)

    # -- how a request ends -------------------------------------------------------------------------------------

    async def _ask(self, message: Message, payload: Any = None, each_s: float = ASK_S) -> Answer:
        """Of the coordinator, which may be away: then again, for every request to it may be made twice."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.seat.patience_s
        while True:
            try:
                answer = await self.control.request(COORDINATOR, message, payload, timeout_s=each_s)
            except (Refused, PeerLost, DeadlineExceeded) as error:
                if not worth_asking_again(error):
                    raise self._meant(error) from error
                if isinstance(error, Refused):
                    self._spare()  # its disk is full
                because = error.because or str(error)
            else:
                self.waits.pop(AWAY, None)
                self.waits.pop(f"{AWAY}: next", None)
                return answer
            self._waiting(Wait(self.seat.job, [AWAY], because), until)
            await asyncio.sleep(RETRY_S)

    async def _say(self, message: Message, payload: bytes) -> None:
        """To the coordinator, where no is an error."""
        try:
            await self._ask(message, payload)
        except Refused as refused:
            what = f"{refused.peer} refused {self.seat.worker}: {refused.because}"
            raise ZmlError(REFUSED, what) from refused

    async def _tell(
        self, whom: Callable[[], str], what: Callable[[str], Message], payload: Any = None
    ) -> Answer:
        """Until the shard has answered, over any number of its lives; who that is and what it is told may change."""
        until = asyncio.get_running_loop().time() + self.seat.patience_s
        while True:
            shard = whom()
            life = self.where.lives[shard]
            if life == UNMET:
                await self.where.find_again(shard, life)
                continue
            try:
                return await self.where.request(shard, what(shard), payload, REPLY_S)
            except Refused as refused:
                if refused.code == "fenced":
                    raise ZmlError(FENCED, f"{self.seat.worker}: {refused.because}") from refused
                if refused.code in ELSEWHERE:  # it was started again, or lives in another process by now
                    await self.where.find_again(shard, life)
                elif refused.code in LATER:
                    if refused.code == FULL:
                        self._spare()
                    self._waiting(Wait(self.seat.job, [shard], refused.because), until)
                    await asyncio.sleep(FULL_S if refused.code == FULL else RETRY_S)
                else:
                    raise
            except (DeadlineExceeded, PeerLost):
                await self.where.find_again(shard, life)

    def _meant(self, error: Refused | DeadlineExceeded | PeerLost) -> Exception:
        """What it means for this worker."""
        if not isinstance(error, Refused):
            return self._lost(str(error))
        if error.code == "fenced":
            return ZmlError(FENCED, f"{self.seat.worker}: {error.because}")
        return error

    async def _settled(
        self, ask: Callable[[], Any], *kinds: type[Message], code: str = REFUSED, enough: Enough = never
    ) -> Answer | None:
        """Ask until the answer is one of `kinds`: `Wait` and "early" mean later, any other refusal is an error.

        None if `enough` came to hold before.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self.seat.patience_s
        while not enough():
            try:
                answer: Answer = await ask()
            except Refused as refused:
                if refused.code not in LATER or loop.time() > until:
                    raise ZmlError(
                        code, f"{refused.peer} refused {self.seat.worker}: {refused.because}"
                    ) from refused
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(answer.message, kinds):
                self.waits.clear()
                return answer
            assert isinstance(answer.message, Wait), answer.message
            self._waiting(answer.message, until)
        return None

    def _waiting(self, wait: Wait, until: float) -> None:
        """Wait on, if there is time left."""
        if wait.moved and wait.moved != self.moved:
            self.moved = wait.moved
            self._spare()
        if asyncio.get_running_loop().time() > max(until, self.spared_at + self.seat.patience_s):
            whom = ", ".join(wait.waiting_for) or "the job"
            raise self._lost(f"waited {self.seat.patience_s:g} s for {whom}: {wait.because}")
        self.note_wait(wait)

    def _spare(self) -> None:
        """What is waited for takes as long as it takes, a disk that is full above all: patience begins anew, also
        that of those who wait for whoever is held up by it."""
        self.spared += 1
        self.spared_at = asyncio.get_running_loop().time()

    def note_wait(self, wait: Wait) -> None:
        """Say who is waited for: after ten seconds, and each time twice as long again."""
        whom = ", ".join(wait.waiting_for) or "the job"
        now = asyncio.get_running_loop().time()
        waited_s = now - self.waits.setdefault(whom, now)
        if waited_s >= self.waits.setdefault(f"{whom}: next", 10.0):
            self.waits[f"{whom}: next"] = 2 * waited_s
            log.warning(
                "waiting",
                worker=self.seat.worker,
                waiting_for=whom,
                waited_s=round(waited_s),
                because=wait.because,
            )

    def _lost(self, what: str) -> ZmlError:
        return ZmlError(
            LOST, f"{self.seat.worker}: {what}", "Look into the log of that process in the run directory."
        )
