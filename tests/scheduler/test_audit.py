"""The audit finds what a ledger or its user did wrong, and finds nothing where nothing is wrong."""

import random
from collections.abc import Callable

import msgspec
import pytest

from zml.scheduler import calls
from zml.scheduler.audit import EpochAccount, audit
from zml.scheduler.batches import Condemned, Ledger, Over, Taken
from zml.scheduler.epoch import COMMITTED
from zml.scheduler.ids import Seat, WorkerId

W0, W1, W2 = (WorkerId(f"w{n}") for n in range(3))


def members(*workers: WorkerId, incarnation: int = 1) -> calls.Members:
    return calls.Members(tuple(Seat(worker, incarnation, True) for worker in workers))


def opening(
    epoch: int, batches: int, *workers: WorkerId, samples: int = 0, size: int = 0
) -> list[calls.Call]:
    return [calls.Open(worker, epoch, batches, b"order", samples, size) for worker in workers]


def test_an_epoch_that_went_well_is_sound_and_its_samples_are_counted_to_the_last_short_batch() -> None:
    made = [
        members(W0, W1),
        *opening(0, 4, W0, W1, samples=29, size=8),
        calls.Take(W0, 0, 16, 0),
        calls.Take(W1, 0, 16, 0),
        calls.Commit(W0, 0, (0, 2)),
        calls.Commit(W1, 0, (1, 3)),
        calls.Take(W0, 0, 16, 2),
    ]
    assert audit(made) == [EpochAccount(0, 4, samples=29, committed=4, closed=True)]


def test_batches_of_a_lost_worker_are_counted_as_reissued_and_an_open_epoch_has_nothing_missing() -> None:
    made = [
        members(W0, W1),
        *opening(0, 4, W0, W1, samples=32, size=8),
        calls.Take(W0, 0, 16, 0),
        calls.Take(W0, 0, 16, 0),  # the answer was lost
        calls.Settle(W0, 0, 1),
        members(W1),
        calls.Take(W1, 0, 16, 0),
        calls.Commit(W1, 0, (2, 1)),
    ]
    (account,) = audit(made)
    assert account == EpochAccount(0, 4, samples=24, committed=3, reissued=1, to_go=1)
    assert account.sound


def test_a_skipped_batch_is_accounted_for_with_its_samples_and_its_reason() -> None:
    made = [
        members(W0),
        *opening(0, 2, W0, samples=16, size=8),
        calls.Take(W0, 0, 16, 0),
        calls.Skip(W0, 0, 1, "a gradient is not finite", (4, 7)),
        calls.Skip(W0, 0, 1, "twice is the same as once", (4, 7)),
        calls.Commit(W0, 0, (0,)),
        *opening(1, 2, W0, samples=16, size=8),
    ]
    first, second = audit(made)
    assert (first.committed, first.samples, first.missing, first.closed) == (1, 8, 0, True)
    assert [(s.batch, s.worker, s.samples) for s in first.skipped] == [(1, W0, (4, 7))]
    assert first.sound and second == EpochAccount(1, 2, samples=0, to_go=2)


def test_what_the_ledger_refuses_changes_no_account() -> None:
    made = [
        members(W0, W1),
        *opening(0, 2, W0, W1),
        calls.Take(W0, 0, 16, 0),
        calls.Commit(W1, 0, (0,)),  # which w0 holds
        calls.Commit(W0, 0, (0,)),
        calls.Commit(W1, 0, (0,)),  # accepted, for it is committed; but w1 never had it
    ]
    (account,) = audit(made)
    assert account.duplicates == 1 and account.faults == ["batch 0 was committed by w1 after it was over"]


class Forgets(Ledger):
    """Closes an epoch that has a batch to go."""

    def commit(self, worker, epoch, batches):  # type: ignore[no-untyped-def]
        assert self.current is not None
        answer = super().commit(worker, epoch, batches)
        for batch in list(self.current.leases)[:1] if self.current.to_go == 1 else []:
            self.current.end(batch, COMMITTED)
        return answer


class Doubles(Ledger):
    """Gives the first batch to everybody."""

    def take(self, worker, epoch, most, have=None, clock=0):  # type: ignore[no-untyped-def]
        answer = super().take(worker, epoch, most, have, clock)
        return Taken((0, *answer.batches)) if isinstance(answer, Taken) else answer


class Trusts(Ledger):
    """Believes whoever says that a batch is done."""

    def commit(self, worker, epoch, batches):  # type: ignore[no-untyped-def]
        assert self.current is not None
        for batch in batches:
            self.current.state[batch] = COMMITTED
        return None


class KeepsLeases(Ledger):
    """Deals a batch again although the worker that has it lives."""

    def take(self, worker, epoch, most, have=None, clock=0):  # type: ignore[no-untyped-def]
        if self.current is not None and worker == W1:
            return Taken((0,))
        return super().take(worker, epoch, most, have, clock)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Forgets, lambda account: account.missing == 1),
        (Doubles, lambda account: account.duplicates >= 1),
        (Trusts, lambda account: account.unleased == 1),
        (KeepsLeases, lambda account: account.duplicates == 1),
    ],
    ids=["forgets", "doubles", "trusts", "keeps leases"],
)
def test_a_broken_ledger_is_found(kind: type[Ledger], wrong: Callable[[EpochAccount], bool]) -> None:
    made = [
        members(W0, W1),
        *opening(0, 4, W0, W1),
        calls.Take(W0, 0, 16, 0),
        calls.Take(W1, 0, 2, 0),
        calls.Commit(W0, 0, (0,)),
        calls.Commit(W0, 0, (2,)),
        calls.Commit(W1, 0, (1,)) if kind is not Trusts else calls.Commit(W0, 0, (3,)),
        calls.Take(W0, 0, 16, 2),
        *opening(1, 4, W0),
    ]
    account = audit(made, kind())[0]
    assert wrong(account) and not account.sound and account.faults


def test_calls_travel_as_their_kind_and_their_fields() -> None:
    made: list[calls.Call] = [
        members(W0, W1),
        calls.Resume(2, 2, b"t", (0,), (1,), 9, 5),
        *opening(3, 2, W0, samples=9, size=5),
        calls.Take(W0, 3, 16),
        calls.Take(W0, 3, 16, 0),
        calls.Reached(3, 7),
        calls.Commit(W0, 3, (0, 1)),
        calls.Settle(W0, 3, 2),
        calls.Skip(W0, 3, 1, "why", (1, 2)),
        calls.Blame(W0, 2),
        calls.Drain("Ctrl-C"),
    ]
    assert {type(call) for call in made} == set(calls.KINDS.values())
    for call in made:
        raw = msgspec.msgpack.encode(call)
        assert msgspec.msgpack.decode(raw, type=calls.KINDS[type(call).__name__]) == call


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_to_the_workers_the_audit_of_our_ledger_is_sound(seed: int) -> None:
    """Workers take, lose answers, commit, skip, crash and come again; every epoch ends; all of it is replayed."""
    dice, ledger, made = random.Random(seed), Ledger(), []
    kept: list[calls.Call] = []
    incarnation = {W0: 1, W1: 1, W2: 1}
    sizes = [dice.randrange(1, 30) for _ in range(4)]

    def do(call: calls.Call) -> object:
        made.append(call)
        answer = ledger.perform(call)
        if ledger.news:
            kept.append(call)
        return answer

    def tell() -> None:
        do(calls.Members(tuple(Seat(worker, number, False) for worker, number in incarnation.items())))

    tell()
    for epoch, batches in enumerate(sizes):
        got: dict[WorkerId, list[int]] = {worker: [] for worker in incarnation}
        for worker in incarnation:
            do(calls.Open(worker, epoch, batches, b"", batches * 3 - 1, 3))
        while True:
            worker = dice.choice(list(incarnation))
            answer = do(calls.Take(worker, epoch, dice.randrange(1, 5), len(got[worker])))
            if isinstance(answer, Over):
                break
            if isinstance(answer, Taken) and dice.random() < 0.8:  # else it is lost
                got[worker] += answer.batches
            fate = dice.random()
            if fate < 0.15:
                do(calls.Settle(worker, epoch, dice.randrange(len(got[worker]) + 1)))
                condemned = do(calls.Blame(worker, 2))
                if isinstance(condemned, Condemned):
                    assert do(calls.Skip(worker, epoch, condemned.batch, "it kills")) is None
                incarnation[worker] += 1
                got[worker] = []
                tell()
                do(calls.Open(worker, epoch, batches, b"", batches * 3 - 1, 3))
            elif fate < 0.2 and got[worker]:
                do(calls.Skip(worker, epoch, got[worker][-1], "not finite"))
            elif fate < 0.7:
                for batch in got[worker]:
                    do(calls.Commit(worker, epoch, (batch,)))
        ledger.check()
    accounts = audit(made)
    assert [(a.epoch, a.batches, a.closed) for a in accounts] == [(e, n, True) for e, n in enumerate(sizes)]
    for account in accounts:
        assert account.sound, f"seed {seed}: {account}"
        assert account.committed + len(account.skipped) == account.batches
    replayed = Ledger()
    for call in kept:
        replayed.perform(call)
    assert len(kept) < len(made) and audit(kept) == accounts, f"seed {seed}"
    for name in ("epoch", "incarnations", "present", "current", "draining"):
        assert getattr(replayed, name) == getattr(ledger, name), f"seed {seed}: {name}"


def test_an_epoch_of_an_earlier_run_is_whole_with_what_it_had_done() -> None:
    (account,) = audit(
        [
            calls.Resume(4, 3, b"t", committed=(0,), skipped=(2,)),
            members(W0),
            *opening(4, 3, W0),
            calls.Take(W0, 4, 16),
            calls.Commit(W0, 4, (1,)),
            calls.Take(W0, 4, 16),
        ]
    )
    assert account.sound and account.closed
    assert (account.epoch, account.committed, account.missing, account.duplicates) == (4, 2, 0, 0)
