"""The coordinator's desk for data: what scripts ask of the ledger and of evaluations, and what becomes of bad batches.

It decides nothing itself: `scheduler.batches` and `scheduler.evaluation` do. Rule: the ledger is changed by `perform`
alone, one call after another, so that this is the place where calls can be written down before they are answered.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import msgspec
import structlog

from ..errors import BAD_BATCH, ZmlError
from ..messages import (
    Contents,
    Depart,
    Departed,
    Drained,
    EpochOpened,
    EpochOver,
    Evaluate,
    Evaluating,
    JobSpec,
    Message,
    Ok,
    OpenEpoch,
    Result,
    Skip,
    Take,
    Taken,
    Totals,
    Wait,
)
from ..scheduler import batches, calls, evaluation, events
from ..scheduler.explain import name_samples
from ..scheduler.ids import JobId, Seat, WorkerId
from ..transport import Refusal
from .docket import Docket
from .notes import Notes

HOLD_S = 1.0  # who must wait is answered after this long, with the names of who is waited for
NAMED = 32  # of those who are waited for, in one answer
MOST_SAMPLES = 1_000  # of one batch, that are kept for whoever asks which they were
ENDED_BY_SOMEBODY = frozenset(
    {1, 2, 3, 10, 12, 15}
)  # SIGHUP, INT, QUIT, USR1, USR2, TERM: no batch does that

log = structlog.get_logger()
Reply = Message | tuple[Message, bytes | None]


class Hall(Protocol):
    """The coordinator, as its desks see it."""

    job: JobId
    spec: JobSpec
    docket: Docket
    notes: Notes

    def admit(self, worker: str, incarnation: int) -> None:
        """Refuse a script whose incarnation is over."""
        ...

    def wake(self) -> None:
        """Something has changed: whoever waits looks again."""
        ...

    async def pause(self, end: float) -> bool:
        """Until something changes; False when `end` came first."""
        ...


class Dealer:
    """One job's data."""

    def __init__(self, hall: Hall) -> None:
        self.hall = hall
        self.ledger = hall.docket.ledger
        self.evaluations = evaluation.Evaluations()
        self.attempt = secrets.token_hex(
            4
        )  # evaluations are kept by this process, and begin anew with another
        self.stalls = 0  # grows while a shard waits for room on its disk: nobody is to lose patience then
        self.departed: set[tuple[str, int]] = set()
        self.stopped_by: ZmlError | None = None  # a condemned batch, where that ends the job
        self.contents: dict[
            tuple[int, int], tuple[int, ...]
        ] = {}  # samples of suspects, of the open epoch only

    def perform(self, call: calls.Call) -> batches.Answer:
        """It is written down before anybody is told of the answer."""
        return self.hall.docket.perform(call)

    def members(self, seats: Iterable[Seat]) -> None:
        seats = tuple(seats)
        self.perform(calls.Members(seats))
        self.evaluations.members(seats)

    def depart(self, message: Depart, here: Iterable[Seat]) -> Reply:
        """A worker takes no more batches."""
        self.hall.admit(message.worker, message.incarnation)
        self.departed.add((message.worker, message.incarnation))
        left = {(seat.worker, seat.incarnation) for seat in here} - self.departed
        return Departed(self.hall.job, last=not left)

    def settle(self, worker: WorkerId, incarnation: int, clock: int, epoch: int, done: int) -> None:
        """What the shards say of a lost worker: the step of this clock is its last, and has `done` of its batches."""
        if epoch < 0 or self.ledger.incarnations.get(worker) != incarnation:
            return  # it had no loader, or was taken out before another coordinator took over
        self.perform(calls.Reached(epoch, clock + 1))
        refused = self.perform(calls.Settle(worker, epoch, done))
        if isinstance(refused, batches.Mismatch):
            log.error("a lost worker's batches do not fit the ledger", worker=worker, because=refused.because)

    # -- training ---------------------------------------------------------------------------------------------

    async def open_epoch(self, message: OpenEpoch, state: bytes) -> Reply:
        """Answered once the senior worker has shown its generator state and the epoch before is over."""
        self.hall.admit(message.worker, message.incarnation)
        call = calls.Open(
            WorkerId(message.worker),
            message.epoch,
            message.batches,
            state,
            message.samples,
            message.batch_size,
        )
        end = asyncio.get_running_loop().time() + HOLD_S
        while True:
            opened = self.perform(call)
            if not isinstance(opened, batches.Waiting):
                self.hall.wake()
                break
            if not await self.hall.pause(end):
                break
            self.hall.admit(message.worker, message.incarnation)
        match opened:
            case batches.Opened():
                opener = self.hall.notes.from_whom(message.epoch)
                return EpochOpened(self.hall.job, message.epoch, opened.first_clock, opener), opened.token
            case batches.Drained():
                return Drained(self.hall.job, opened.because)
            case batches.Mismatch():
                raise Refusal("epoch", opened.because)
        assert isinstance(opened, batches.Waiting)
        return self.wait(opened.waiting_for, opened.because)

    async def take(self, message: Take, done: memoryview | None) -> Reply:
        self.hall.admit(message.worker, message.incarnation)
        worker = WorkerId(message.worker)
        if self.evaluations.release(worker):
            self.hall.wake()  # it left an evaluation early, by an exception that its script has caught
        self.perform(calls.Reached(message.epoch, message.clock))
        if done is not None:
            try:
                applied = msgspec.msgpack.decode(done, type=list[tuple[int, int]])
            except msgspec.MsgspecError as bad:
                raise Refusal("ledger", f"the batches that are applied cannot be read: {bad}") from None
            numbers = tuple(spread(applied, self.ledger.batches))
            refused = self.perform(calls.Commit(worker, message.epoch, numbers))
            if isinstance(refused, batches.Mismatch):
                raise Refusal("ledger", refused.because)
            self.hall.wake()
        if message.most == 0:  # it leaves, and only tells
            return Taken(self.hall.job, message.epoch, [])
        end = asyncio.get_running_loop().time() + (HOLD_S if message.hold else 0.0)
        dealt_again = self.ledger.dealt_again
        while True:
            taken = self.perform(calls.Take(worker, message.epoch, message.most, message.have, message.clock))
            # Whoever gets the last parameters of an epoch is to get all that is in them.
            behind = self.hall.docket.behind() if isinstance(taken, batches.Over) else []
            if not (behind or isinstance(taken, batches.Waiting)) or self.ledger.dealt_again != dealt_again:
                break  # who waits must rest longer now, and somebody may wait for that
            if not await self.hall.pause(end):
                break
            self.hall.admit(message.worker, message.incarnation)
        match taken:
            case batches.Taken():
                suspects = self.ledger.suspects(taken.batches)
                return Taken(self.hall.job, message.epoch, list(taken.batches), suspects)
            case batches.Over() if behind:
                return self.wait(behind, "they are to count a step of a worker that is gone")
            case batches.Over():
                return EpochOver(self.hall.job, message.epoch, taken.next_clock)
            case batches.Drained():
                return Drained(self.hall.job, taken.because)
            case batches.Mismatch():
                raise Refusal("ledger", taken.because)
        assert isinstance(taken, batches.Waiting)
        return self.wait(taken.waiting_for, taken.because, dealt_again=self.ledger.dealt_again)

    # -- batches that do harm -----------------------------------------------------------------------------

    def know(self, message: Contents, payload: bytes) -> Reply:
        """Which samples a suspect holds, before the next script computes it."""
        self.hall.admit(message.worker, message.incarnation)
        if message.epoch == self.ledger.epoch and self.ledger.suspects([message.batch]):
            self.contents = {key: kept for key, kept in self.contents.items() if key[0] == message.epoch}
            self.contents[message.epoch, message.batch] = read_samples(payload)
        return Ok()

    def skip(self, message: Skip, payload: bytes) -> Reply:
        """A worker leaves a batch out that it holds."""
        self.hall.admit(message.worker, message.incarnation)
        if self.hall.spec.on_bad_batch != "skip":
            raise Refusal("ledger", "this job leaves no batch out; --on-bad-batch skip would")
        call = calls.Skip(
            WorkerId(message.worker), message.epoch, message.batch, message.because, read_samples(payload)
        )
        self._skip(call)
        return Ok()

    def _skip(self, call: calls.Skip) -> None:
        refused = self.perform(call)
        if isinstance(refused, batches.Mismatch):
            raise Refusal("ledger", refused.because)
        log.warning(
            "batch skipped",
            epoch=call.epoch,
            batch=call.batch,
            worker=call.worker,
            because=call.because,
            samples=list(call.samples),
        )
        self.hall.wake()

    def crashed(self, event: events.Exited, begun: tuple[int, int] | None = None) -> events.Exited:
        """A script ended badly, and its worker is still a member: who is to blame, and so what the event means.

        `begun`: how many batches it had begun, of which epoch; in another than the open one it says that none had.
        Crashing over a batch counts as a loss of the worker where bad batches are to be skipped. Where they are to stop
        the job, the crash that condemns a batch counts as a failure of the script, which does.
        """
        if event.signal in ENDED_BY_SOMEBODY:
            return event
        worker = WorkerId(event.worker)
        if self.ledger.incarnations.get(worker) != event.incarnation:
            return event  # it ended before it could have been given a batch
        count = None
        if begun is not None:
            count = max(begun[1], 0) if begun[0] == self.ledger.epoch else 0
        verdict = self.perform(calls.Blame(worker, self.hall.spec.bad_batch_kills, count))
        if verdict is None:
            return event
        skips = self.hall.spec.on_bad_batch == "skip"
        if not isinstance(verdict, batches.Condemned):
            return replace(event, is_loss=skips)
        samples = self.contents.get((verdict.epoch, verdict.batch), ())
        what = f"batch {verdict.batch} of epoch {verdict.epoch + 1} ({name_samples(samples)})"
        because = f"{event.because}; {what} was in hand when {verdict.kills} scripts ended so"
        if skips:
            self._skip(calls.Skip(worker, verdict.epoch, verdict.batch, because, samples))
            return replace(event, is_loss=True)
        fix = "Look at these samples, or leave such batches out with --on-bad-batch skip."
        self.stopped_by = ZmlError(BAD_BATCH, because, fix)
        return replace(event, code=self.stopped_by.exit_code, signal=0, because=because, returns=False)

    # -- evaluations --------------------------------------------------------------------------------------

    async def evaluate(self, message: Evaluate, payload: memoryview | None) -> Reply:
        self.hall.admit(message.worker, message.incarnation)
        if message.attempt not in ("", self.attempt):
            return Evaluating(self.hall.job, self.attempt, [])
        worker, key = WorkerId(message.worker), evaluation.Key(message.epoch, message.number)
        if payload is not None:
            try:
                results = msgspec.msgpack.decode(payload, type=list[Result])
            except msgspec.MsgspecError as bad:
                raise Refusal("evaluation", f"the results cannot be read: {bad}") from None
            refused = self.evaluations.report(worker, key, ((r.batch, r.numbers) for r in results))
            if refused is not None:
                raise Refusal("evaluation", refused.because)
            self.hall.wake()
        end = asyncio.get_running_loop().time() + (HOLD_S if message.hold else 0.0)
        while True:
            answer = self.evaluations.ask(worker, key, message.batches, message.holds)
            if not isinstance(answer, batches.Waiting) or not await self.hall.pause(end):
                break
            self.hall.admit(message.worker, message.incarnation)
        match answer:
            case batches.Taken():
                return Evaluating(self.hall.job, self.attempt, list(answer.batches))
            case evaluation.Totals():
                return Totals(self.hall.job), msgspec.msgpack.encode(answer.totals)
            case batches.Mismatch():
                raise Refusal("evaluation", answer.because)
        return self.wait(answer.waiting_for, answer.because)

    def wait(self, whom: Sequence[str], because: str, *, dealt_again: bool = False, moved: int = 0) -> Wait:
        return Wait(self.hall.job, list(whom[:NAMED]), because, dealt_again, moved + self.stalls)


def spread(runs: Iterable[tuple[int, int]], most: int) -> list[int]:
    """The numbers of [first, last] `intervals`; Refusal if they are more than `most`."""
    numbers: list[int] = []
    for first, last in runs:
        if not 0 <= first <= last or len(numbers) + last - first >= most:
            raise Refusal("ledger", f"there are no batches {first} to {last} in an epoch of {most}")
        numbers += range(first, last + 1)
    return numbers


def read_samples(payload: bytes) -> tuple[int, ...]:
    """Indices of samples, the first MOST_SAMPLES; Refusal for what is none."""
    try:
        return tuple(msgspec.msgpack.decode(payload, type=list[int])[:MOST_SAMPLES])
    except msgspec.MsgspecError as bad:
        raise Refusal("ledger", f"the samples cannot be read: {bad}") from None
