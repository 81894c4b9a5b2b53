"""Which worker computes which batch: the data ledger of one job.

An epoch is opened by the most senior worker that is present: it shows how many batches there are and the token from
which every worker draws their order. The batches are dealt like cards to the workers that are present, in order of
seniority, and what nobody has taken yet is dealt anew whenever one of them goes or another comes. A batch that was
taken is leased; it is committed when its gradient is applied. The next epoch opens when all are committed.

Rules: no batch is ever lost; it is leased to one worker at a time, and again to another only when that worker is gone.
The ledger is deterministic: the same calls in the same order give the same deal. It knows no time; whoever must wait is
told for whom, and asks again.

A batch that kills: when a script crashes, every batch that it had in hand becomes a suspect, for it may have crashed
over one that its loader had only begun to read. What it had taken and not begun is innocent. A suspect goes out alone
from then on, and is cleared when it is committed. So the next crash over it convicts nobody else, and with enough of
them it is condemned.

A founder is present from the start, any other worker from its first `open`: nobody waits for a script that is still
importing its libraries.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from . import calls
from .epoch import COMMITTED, SKIPPED, Pass
from .ids import Seat, WorkerId

MOST_BATCHES = 10_000_000  # in one epoch: a peer names the number, and the ledger allocates by it


@dataclass(frozen=True, slots=True)
class Opened:
    """The epoch is open. `token` is the senior worker's; `first_clock` is where every worker begins or has begun."""

    first_clock: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Taken:
    """These batches are leased to the asker until it commits them or is gone."""

    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not yet. Ask again when something has changed."""

    waiting_for: tuple[WorkerId, ...]  # in order of seniority
    because: str


@dataclass(frozen=True, slots=True)
class Over:
    """Every batch of the epoch is committed. `next_clock` is the first of the next epoch, for every worker."""

    next_clock: int


@dataclass(frozen=True, slots=True)
class Drained:
    """No more batches: the job is being drained."""

    because: str


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The asker contradicts the ledger. Nothing has changed."""

    because: str


@dataclass(frozen=True, slots=True)
class Suspected:
    """A script crashed with these in hand. They go out one at a time."""

    epoch: int
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Condemned:
    """In hand when `kills` scripts crashed, the last time alone. What becomes of it is the user's choice."""

    epoch: int
    batch: int
    kills: int


OpenAnswer: TypeAlias = Opened | Waiting | Drained | Mismatch
TakeAnswer: TypeAlias = Taken | Waiting | Over | Drained | Mismatch
Answer: TypeAlias = Opened | Taken | Waiting | Over | Drained | Mismatch | Suspected | Condemned | None


class Ledger:
    """One job's account of its data. `members` is told of every generation; the other calls come from workers."""

    def __init__(self) -> None:
        self.epoch = 0  # the one that is open, or will be opened first
        self.incarnations: dict[WorkerId, int] = {}  # of the members, in order of seniority
        self.present: list[WorkerId] = []  # members that batches are dealt to, in order of seniority
        self.current: Pass | None = None  # None before the first epoch
        self.draining: str | None = None
        self.reissued = 0  # batches that workers held when they were lost, in all epochs
        self.samples = 0  # in batches that were committed, in all epochs, as far as workers have said
        self.news = False  # the last call has changed something, or told that an epoch is over: write it down

    @property
    def batches(self) -> int:
        """Of the open epoch; 0 before the first."""
        return self.current.batches if self.current is not None else 0

    @property
    def committed(self) -> int:
        """How many of them are applied."""
        current = self.current
        return current.batches - current.to_go - current.skipped if current is not None else 0

    @property
    def skipped(self) -> int:
        """How many of them are left out."""
        return self.current.skipped if self.current is not None else 0

    def suspects(self, batches: Iterable[int]) -> list[int]:
        """Those of the open epoch's batches that were in hand when a script crashed, and are not over yet."""
        return [batch for batch in batches if self.current is not None and batch in self.current.strikes]

    @property
    def dealt_again(self) -> bool:
        """Workers came or went in the open epoch, or one of them began it late, where others had come to rest already:
        who has no batch may have to rest longer than it began to."""
        return self.current is not None and (self.current.dealt_again or self.current.beyond)

    def perform(self, call: calls.Call) -> Answer:
        """Do what a call says: the one way in for whoever writes down what was done.

        Afterwards `news` says whether there is anything to write: whoever waits asks again and again. Calls without
        news may be left out, and a replay of the others gives the same ledger.
        """
        self.news = False
        match call:
            case calls.Members():
                self.members(call.seats)
            case calls.Resume():
                self.resume(call)
            case calls.Open():
                return self.open(
                    call.worker, call.epoch, call.batches, call.token, call.samples, call.batch_size
                )
            case calls.Take():
                return self.take(call.worker, call.epoch, call.most, call.have, call.clock)
            case calls.Reached():
                self.reached(call.epoch, call.clock)
            case calls.Commit():
                return self.commit(call.worker, call.epoch, call.batches)
            case calls.Settle():
                return self.settle(call.worker, call.epoch, call.done)
            case calls.Skip():
                return self.skip(call.worker, call.epoch, call.batch)
            case calls.Blame():
                return self.blame(call.worker, call.kills, call.begun)
            case calls.Drain():
                self.drain(call.because)
        return None

    # -- who takes part ------------------------------------------------------------------------------

    def members(self, seats: Iterable[Seat]) -> None:
        """The active workers of a new generation, in order of seniority. Twice is the same as once.

        Whoever is gone, or has come again as a new incarnation, gives back what it has not committed.
        """
        seats = list(seats)
        former, self.incarnations = self.incarnations, {seat.worker: seat.incarnation for seat in seats}
        self.news = [*former.items()] != [*self.incarnations.items()]
        same = {worker for worker, number in self.incarnations.items() if former.get(worker) == number}
        gone = [worker for worker in self.present if worker not in same]
        present = [
            seat.worker
            for seat in seats
            if (seat.worker in same and seat.worker in self.present)
            or (seat.worker not in same and seat.founder)
        ]
        self._deal_to(present, gone)

    def _come(self, worker: WorkerId) -> None:
        if worker not in self.present:
            self._deal_to([w for w in self.incarnations if w in self.present or w == worker], gone=[])

    def _deal_to(self, present: list[WorkerId], gone: list[WorkerId]) -> None:
        changed = gone or present != self.present
        self.present = present
        self.news = self.news or bool(changed)
        if self.current is None or not changed:
            return
        for worker in gone:
            self.reissued += self.current.take_back(worker)
        self.current.deal(present)
        self.current.dealt_again = True

    def drain(self, because: str) -> None:
        """Give out nothing more. What is leased can still be committed."""
        self.news = self.draining != because
        self.draining = because

    # -- what workers ask ----------------------------------------------------------------------------

    def open(
        self, worker: WorkerId, epoch: int, batches: int, token: bytes, samples: int = 0, batch_size: int = 0
    ) -> OpenAnswer:
        """A worker is at the start of an epoch in which it sees `batches` batches. Twice is the same as once.

        `token` is what it would draw their order from; the answer holds the one that counts.
        """
        assert worker in self.incarnations, f"{worker} is not a member"
        if not 0 <= batches <= MOST_BATCHES:
            return Mismatch(
                f"{worker} sees {batches:,} batches in an epoch; 0 to {MOST_BATCHES:,} can be kept account of"
            )
        if self.draining is not None:
            return Drained(self.draining)
        current = self.current
        if current is not None and epoch < current.epoch:
            return Opened(current.first_clock, token)  # long over: no batch of it is left to draw
        if epoch < 0 or (current is not None and epoch > current.epoch + 1):
            return Mismatch(f"{worker} opens epoch {epoch + 1}, and the job is in epoch {self.epoch + 1}")
        if current is not None and epoch == current.epoch:
            if batches != current.batches:
                return Mismatch(
                    f"{worker} sees {batches:,} batches in epoch {epoch + 1}, and {current.opener} {current.batches:,}"
                )
            if 0 not in (samples, current.samples) and samples != current.samples:
                return Mismatch(
                    f"{worker} sees {samples:,} samples in epoch {epoch + 1}, and {current.opener} {current.samples:,}"
                )
            self._come(worker)
            return Opened(current.first_clock, current.token)
        if current is not None and not current.over:
            return self._wait_for(current)
        self._come(worker)
        senior = self.present[0]
        if worker != senior:
            return Waiting((senior,), f"{senior} has not opened epoch {epoch + 1} yet, and its order counts")
        first_clock = current.next_clock if current is not None else 0
        self.current = Pass(
            epoch, batches, first_clock, token, worker, samples, batch_size, bytearray(batches), batches
        )
        self.current.undealt = list(range(batches))
        self.current.deal(self.present)
        self.epoch = epoch
        self.news = True
        return Opened(first_clock, token)

    def take(
        self, worker: WorkerId, epoch: int, most: int, have: int | None = None, clock: int = 0
    ) -> TakeAnswer:
        """Lease up to `most` batches to this worker, which stands at `clock`.

        `have` says how many batches of this epoch have reached this incarnation. They are handed out in one sequence,
        and the answer goes on after the first `have` of it: so asking again after a lost answer leases nothing twice.
        None stands for all of them, where the transport makes sure that no answer is lost.
        """
        assert worker in self.incarnations, f"{worker} is not a member"
        current = self.current
        if current is not None and (epoch < current.epoch or (epoch == current.epoch and current.over)):
            self.news = True
            return Over(current.first_clock if epoch < current.epoch else current.next_clock)
        if self.draining is not None:
            return Drained(self.draining)
        if current is None or epoch != current.epoch or worker not in self.present:
            return Mismatch(f"{worker} has not opened epoch {epoch + 1}")
        given = current.given[worker]
        have = len(given) if have is None else have
        if not 0 <= have <= len(given) or most < 1:
            return Mismatch(
                f"{worker} asks for {most} batches after {have}, and was given {len(given)} in epoch {epoch + 1}"
            )
        if have == len(given):
            self._lease(current, worker, most, clock)
        if have == len(given):
            return self._wait_for(current)
        return Taken(tuple(given[have : have + most]))

    def reached(self, epoch: int, clock: int) -> None:
        """A worker has got to this clock. To be told before its batches are committed."""
        current = self.current
        if current is not None and epoch == current.epoch and not current.over:
            self.news = clock > current.furthest
            current.furthest = max(current.furthest, clock)

    def commit(self, worker: WorkerId, epoch: int, batches: Iterable[int]) -> Mismatch | None:
        """The gradients of these batches are applied. Twice is the same as once; None when all is well."""
        assert worker in self.incarnations, f"{worker} is not a member"
        current = self.current
        batches = list(batches)
        if not batches or (current is not None and epoch < current.epoch):
            return None
        if current is None or epoch > current.epoch:
            return Mismatch(f"{worker} commits batches of epoch {epoch + 1}, which is not open")
        for batch in batches:
            if not 0 <= batch < current.batches:
                return Mismatch(f"{worker} commits batch {batch}; epoch {epoch + 1} has {current.batches:,}")
            if current.state[batch] != COMMITTED and current.leases.get(batch) != worker:
                holder = (
                    "was skipped" if current.state[batch] else f"{current.leases.get(batch, 'nobody')} holds"
                )
                return Mismatch(f"{worker} commits batch {batch} of epoch {epoch + 1}, which {holder}")
        for batch in batches:
            if not current.state[batch]:
                self._count(current, batch)
        return None

    def _count(self, current: Pass, batch: int) -> None:
        self.news = True
        self.samples += current.samples_in(batch)
        current.end(batch, COMMITTED)

    # -- checkpoints ---------------------------------------------------------------------------------

    def at_cut(self, applied: Mapping[WorkerId, tuple[int, int]], *, gone_on: bool = False) -> Pass | None:
        """The open epoch as it is in parameters that hold, of each worker, the first batches of an epoch: a copy.

        `applied` is (epoch, done) by worker; what was committed before is in the parameters anyhow. `gone_on`: the
        same workers have trained since, in this epoch, and what they have committed beyond is not in the parameters.
        """
        current = self.current
        if current is None:
            return None
        state = bytearray(current.state)
        if gone_on:
            for batch in (batch for given in current.given.values() for batch in given):
                if state[batch] == COMMITTED:
                    state[batch] = 0
        for worker, (epoch, done) in applied.items():
            if epoch == current.epoch:
                for batch in current.given.get(worker, ())[:done]:
                    state[batch] = state[batch] or COMMITTED
        return _begun(current, state, first_clock=0)

    def resume(self, call: calls.Resume) -> None:
        """Go on in an epoch of an earlier run. Before anybody has opened one."""
        assert self.current is None, "an epoch is open"
        state = bytearray(call.batches)
        for how, batches in ((COMMITTED, call.committed), (SKIPPED, call.skipped)):
            for batch in batches:
                state[batch] = how
        self.news = True
        origin = Pass(
            epoch=call.epoch,
            batches=call.batches,
            first_clock=0,
            token=call.token,
            opener=WorkerId("an earlier run"),
            samples=call.samples,
            batch_size=call.batch_size,
            state=state,
            to_go=call.batches,
        )
        self.current = _begun(origin, state, first_clock=0)
        self.current.deal(self.present)
        self.epoch = call.epoch

    def settle(self, worker: WorkerId, epoch: int, done: int) -> Mismatch | None:
        """What is known of a worker that can no longer say it: the first `done` of what it was given are applied.

        To be told before it is gone, and after `reached` with the clock that it got to. What it had skipped stays
        skipped. Twice is the same as once.
        """
        assert worker in self.incarnations, f"{worker} is not a member"
        current = self.current
        if done < 0 or (current is None and done) or (current is not None and epoch > current.epoch):
            return Mismatch(
                f"{worker} is settled for {done} batches of epoch {epoch + 1}, and the job is in epoch {self.epoch + 1}"
            )
        if current is None or epoch < current.epoch:
            return None  # long over: every batch of it is accounted for
        given = current.given.get(worker, [])
        if done > len(given):
            return Mismatch(
                f"{worker} was given {len(given)} batches of epoch {epoch + 1}, and {done} are to be applied"
            )
        for batch in given[:done]:
            if current.leases.get(batch) == worker:
                self._count(current, batch)
        return None

    # -- batches that do harm ------------------------------------------------------------------------

    def skip(self, worker: WorkerId, epoch: int, batch: int) -> Mismatch | None:
        """Leave a batch out that this worker holds. Twice is the same as once; None when all is well."""
        assert worker in self.incarnations, f"{worker} is not a member"
        current = self.current
        if current is not None and epoch < current.epoch:
            return None
        if current is None or epoch > current.epoch or not 0 <= batch < current.batches:
            return Mismatch(f"{worker} skips batch {batch} of epoch {epoch + 1}, and there is none")
        if current.state[batch] == SKIPPED:
            return None
        if current.leases.get(batch) != worker:
            holder = "is applied" if current.state[batch] else f"{current.leases.get(batch, 'nobody')} holds"
            return Mismatch(f"{worker} skips batch {batch} of epoch {epoch + 1}, which {holder}")
        self.news = True
        current.end(batch, SKIPPED)
        return None

    def blame(self, worker: WorkerId, kills: int, begun: int | None = None) -> Suspected | Condemned | None:
        """The script of this worker crashed. To be told before the worker is gone, and after what it did is settled.

        In hand were those of the first `begun` that it was given which are not applied; None: of all.
        With `kills` crashes a batch is condemned, if it was alone in hand at the last of them. None where no batch was.
        """
        assert worker in self.incarnations, f"{worker} is not a member"
        current = self.current
        if current is None:
            return None
        in_hand = current.held(worker, begun)
        self.news = bool(in_hand)
        for batch in in_hand:
            current.strikes[batch] = current.strikes.get(batch, 0) + 1
        if len(in_hand) == 1 and current.strikes[in_hand[0]] >= kills:
            return Condemned(current.epoch, in_hand[0], current.strikes[in_hand[0]])
        return Suspected(current.epoch, tuple(in_hand)) if in_hand else None

    def _lease(self, current: Pass, worker: WorkerId, most: int, clock: int) -> None:
        share = current.shares[worker]
        held = current.held(worker) if current.strikes else []
        if any(batch in current.strikes for batch in held):
            return  # a suspect stays alone
        rest = current.first_clock + current.batches
        wants = min(most, len(share))
        if share and not current.beyond and clock + len(current.given[worker]) + wants > rest:
            current.beyond = self.news = clock + len(current.held(worker)) + wants > rest
        for _ in range(min(most, len(share))):
            if share[0] in current.strikes and held:
                return
            batch = share.popleft()
            self.news = True
            current.leases[batch] = worker
            current.given[worker].append(batch)
            current.returned.discard(batch)
            current.given_again += current.dealt_again or current.beyond
            held.append(batch)
            if batch in current.strikes:
                return

    def _wait_for(self, current: Pass) -> Waiting:
        owing = tuple(current.owing())
        return Waiting(
            owing,
            f"epoch {current.epoch + 1} has {current.to_go:,} of {current.batches:,} batches to go:"
            f" {current.who_holds()}",
        )

    def check(self) -> None:
        """Every invariant; for tests."""
        assert set(self.present) <= self.incarnations.keys()
        if self.current is not None:
            self.current.check()
            assert self.current.epoch == self.epoch
            assert [*self.current.shares] == self.present


def _begun(origin: Pass, state: bytearray, first_clock: int) -> Pass:
    """An epoch in which these batches are over, and nobody has taken any other."""
    return Pass(
        epoch=origin.epoch,
        batches=origin.batches,
        first_clock=first_clock,
        token=origin.token,
        opener=origin.opener,
        samples=origin.samples,
        batch_size=origin.batch_size,
        state=state,
        to_go=state.count(0),
        undealt=[batch for batch, how in enumerate(state) if not how],
        skipped=state.count(SKIPPED),
    )
