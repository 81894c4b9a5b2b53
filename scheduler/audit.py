"""The proof that every batch counted once: accounts of each epoch, kept anew from the calls that a ledger was given.

The calls are performed on a fresh ledger, and only what it answers is looked at; none of its own accounts is. So a
ledger that doubles or loses a batch is found by this, and not only a coordinator that misuses it. Nothing here is
shared with `epoch.Pass`.

A batch is accounted for when it was committed once, by a worker that held it, or skipped. An epoch is closed once a
worker was told so, or the next one was opened.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from . import calls
from .batches import Ledger, Mismatch, Opened, Over, Taken
from .ids import WorkerId

MOST_FAULTS = 100  # told of one epoch in words; all are counted


@dataclass(slots=True)
class Skipped:
    batch: int
    worker: WorkerId
    because: str
    samples: tuple[int, ...]


@dataclass(slots=True)
class EpochAccount:
    """What became of the batches of one epoch. `samples` are those committed, None where their number was not told."""

    epoch: int
    batches: int
    samples: int | None = None
    committed: int = 0
    reissued: int = 0  # leases of a batch that had been leased before, to a worker that is gone
    skipped: list[Skipped] = field(default_factory=list)
    duplicates: int = 0  # committed again by another worker, or leased to two that both live
    missing: int = 0  # of a closed epoch: neither committed nor skipped
    unleased: int = 0  # committed by a worker that did not hold it
    to_go: int = 0  # of an epoch that is not closed
    closed: bool = False
    faults: list[str] = field(default_factory=list)  # what is wrong, in words, the first MOST_FAULTS

    @property
    def sound(self) -> bool:
        return not (self.duplicates or self.missing or self.unleased or self.faults)

    def fault(self, what: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(what)


class Auditor:
    """Looks at one call and its answer after another."""

    def __init__(self) -> None:
        self.accounts: list[EpochAccount] = []
        self.incarnations: dict[WorkerId, int] = {}
        self._begin(-1)

    def _begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.sizes = (0, 0)  # samples in all, and in each batch but the last
        self.given: dict[WorkerId, list[int]] = {}  # to those that live, in order
        self.holder: dict[int, WorkerId] = {}  # of what is out
        self.issued: set[int] = set()
        self.done: dict[int, tuple[WorkerId, int]] = {}  # committed, and by which incarnation
        self.left_out: set[int] = set()

    def look(self, call: calls.Call, answer: object) -> None:
        if isinstance(answer, Mismatch):
            return  # refused: nothing has changed
        match call:
            case calls.Members():
                self._members(call)
            case calls.Resume():
                self._begin(call.epoch)
                self.sizes = (call.samples, call.batch_size)
                self.done = dict.fromkeys(call.committed, (WorkerId("an earlier run"), 0))
                self.left_out = set(call.skipped)
                self.accounts.append(EpochAccount(call.epoch, call.batches))
            case calls.Open() if isinstance(answer, Opened) and call.epoch > self.epoch:
                self.close(over=True)
                self._begin(call.epoch)
                self.sizes = (call.samples, call.batch_size)
                self.accounts.append(EpochAccount(call.epoch, call.batches))
            case calls.Take() if isinstance(answer, Taken) and call.epoch == self.epoch:
                self._taken(call, answer.batches)
            case calls.Take() if isinstance(answer, Over) and call.epoch == self.epoch:
                self.accounts[-1].closed = True
            case calls.Commit() if call.epoch == self.epoch:
                for batch in call.batches:
                    self._commit(call.worker, batch)
            case calls.Settle() if call.epoch == self.epoch:
                for batch in self.given.get(call.worker, [])[: call.done]:
                    if batch not in self.left_out:
                        self._commit(call.worker, batch)
            case calls.Skip() if call.epoch == self.epoch:
                self._skip(call)

    def close(self, *, over: bool = False) -> None:
        """The epoch is no longer looked at. `over`: the next one has begun, and so nothing may be left of it."""
        if not self.accounts:
            return
        account = self.accounts[-1]
        account.closed = account.closed or over
        lacking = [b for b in range(account.batches) if b not in self.done and b not in self.left_out]
        if account.closed:
            account.missing = len(lacking)
            for batch in lacking[:MOST_FAULTS]:
                account.fault(f"batch {batch} is missing")
        else:
            account.to_go = len(lacking)
        account.committed = len(self.done)
        samples, size = self.sizes
        if size:
            account.samples = sum(min(size, samples - batch * size) for batch in self.done)

    def _members(self, call: calls.Members) -> None:
        former, self.incarnations = self.incarnations, {seat.worker: seat.incarnation for seat in call.seats}
        for worker in former:
            if self.incarnations.get(worker) != former[worker]:
                self.given.pop(worker, None)
                self.holder = {batch: owner for batch, owner in self.holder.items() if owner != worker}

    def _taken(self, call: calls.Take, batches: tuple[int, ...]) -> None:
        account, given = self.accounts[-1], self.given.setdefault(call.worker, [])
        at = len(given) if call.have is None else call.have
        for batch in batches:
            if at < len(given):
                if given[at] != batch:
                    account.fault(
                        f"{call.worker} was given batch {given[at]} and then told {batch} in its place"
                    )
                    account.duplicates += 1
            else:
                given.append(batch)
                self._issue(account, call.worker, batch)
            at += 1

    def _issue(self, account: EpochAccount, worker: WorkerId, batch: int) -> None:
        if not 0 <= batch < account.batches:
            account.fault(f"{worker} was given batch {batch} of {account.batches}")
        elif batch in self.holder:
            account.duplicates += 1
            account.fault(f"batch {batch} went to {worker} while {self.holder[batch]} had it")
        elif batch in self.done or batch in self.left_out:
            account.duplicates += 1
            account.fault(f"batch {batch} went to {worker} after it was over")
        account.reissued += batch in self.issued
        self.issued.add(batch)
        self.holder[batch] = worker

    def _commit(self, worker: WorkerId, batch: int) -> None:
        account, who = self.accounts[-1], (worker, self.incarnations.get(worker, 0))
        if self.done.get(batch) == who:
            return  # twice is the same as once
        if batch in self.done or batch in self.left_out:
            account.duplicates += 1
            account.fault(f"batch {batch} was committed by {worker} after it was over")
            return
        if self.holder.pop(batch, None) != worker:
            account.unleased += 1
            account.fault(f"batch {batch} was committed by {worker}, which did not hold it")
        self.done[batch] = who

    def _skip(self, call: calls.Skip) -> None:
        account = self.accounts[-1]
        if call.batch in self.left_out:
            return
        if call.batch in self.done:
            account.duplicates += 1
            account.fault(f"batch {call.batch} was skipped by {call.worker} after it was committed")
            return
        self.holder.pop(call.batch, None)
        self.left_out.add(call.batch)
        account.skipped.append(Skipped(call.batch, call.worker, call.because, call.samples))


def audit(made: Iterable[calls.Call], ledger: Ledger | None = None) -> list[EpochAccount]:
    """The accounts of every epoch that was opened, from all calls since the job's first, in their order.

    `ledger` is a fresh one, of another kind than ours if need be.
    """
    ledger, auditor = ledger or Ledger(), Auditor()
    for call in made:
        auditor.look(call, ledger.perform(call))
    auditor.close()
    return auditor.accounts
