"""The coordinator's desk for data: what a crash means, and what it does not take."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from zml.coordinator.dealer import MOST_SAMPLES, Dealer
from zml.coordinator.docket import Docket
from zml.coordinator.notes import Notes
from zml.messages import (
    Contents,
    EpochOver,
    Evaluate,
    Evaluating,
    Finished,
    JobSpec,
    Ok,
    Result,
    Skip,
    Take,
    Totals,
    Wait,
)
from zml.scheduler import calls
from zml.scheduler.events import Exited
from zml.scheduler.ids import JobId, Seat, WorkerId
from zml.scheduler.machine import Machine
from zml.scheduler.rules import Rules
from zml.transport import Refusal

W0, W1 = WorkerId("w0"), WorkerId("w1")
ME: dict[str, Any] = {"job": "job", "worker": "w1", "incarnation": 1}


class Hall:
    """A coordinator in which all are members and nothing ever changes."""

    def __init__(self, **spec: Any) -> None:
        self.job, self.spec, self.woken = JobId("job"), JobSpec(**spec), 0
        self.docket = Docket(self.job, Machine(Rules()), None, lambda: 0.0)
        self.notes = Notes(self.docket)

    def admit(self, worker: str, incarnation: int) -> None:
        assert (worker, incarnation) in {("w0", 1), ("w1", 1)}

    def wake(self) -> None:
        self.woken += 1

    async def pause(self, end: float) -> bool:
        return False


def packed(*samples: int) -> bytes:
    return msgspec.msgpack.encode(list(samples))


def suspicious(**spec: Any) -> Dealer:
    """W0 has crashed with batches 0 and 2 of epoch 0 in hand, and W1 has got batch 0 alone."""
    dealer = Dealer(Hall(**spec))
    dealer.members([Seat(W0, 1, True), Seat(W1, 1, True)])
    for worker in (W0, W1):
        dealer.perform(calls.Open(worker, 0, 4, b"", 32, 8))
    dealer.perform(calls.Take(W0, 0, 16, 0))
    event = crash(W0)
    assert dealer.crashed(event) == replace(event, is_loss=spec.get("on_bad_batch") == "skip")
    dealer.members([Seat(W1, 1, True)])
    dealer.perform(calls.Take(W1, 0, 16, 0))
    return dealer


def crash(worker: WorkerId, code: int = 0, signal: int = 11) -> Exited:
    return Exited(JobId("job"), worker, 1, code, signal, "its script was killed by SIGSEGV")


def test_the_crash_that_condemns_a_batch_is_a_failure_that_names_its_samples() -> None:
    dealer = suspicious()
    assert dealer.know(Contents(epoch=0, batch=0, **ME), packed(17, 3)) == Ok()
    event = dealer.crashed(crash(W1))
    assert (event.code, event.signal, event.is_loss) == (5, 0, False)
    assert event.because == (
        "its script was killed by SIGSEGV; batch 0 of epoch 1 (samples 17, 3) was in hand when 2 scripts ended so"
    )


@pytest.mark.parametrize(("code", "signal"), [(0, 9), (1, 0)], ids=["killed", "an exception"])
def test_where_bad_batches_are_skipped_it_is_a_loss_and_the_batch_is_left_out(code: int, signal: int) -> None:
    dealer = suspicious(on_bad_batch="skip")
    event = dealer.crashed(crash(W1, code, signal))
    assert (event.code, event.signal, event.is_loss) == (code, signal, True)
    assert dealer.ledger.skipped == 1 and not dealer.ledger.suspects(range(4)) == [0]


@pytest.mark.parametrize(
    ("begun", "suspects"),
    [(None, [0, 2]), ((0, 2), [0, 2]), ((0, 1), [0]), ((0, 0), []), ((0, -1), []), ((1, 2), [])],
    ids=["not known", "both", "one", "none", "less than none", "another epoch"],
)
def test_only_what_a_script_had_begun_can_be_what_it_crashed_over(
    begun: tuple[int, int] | None, suspects: list[int]
) -> None:
    dealer = Dealer(Hall())
    dealer.members([Seat(W0, 1, True), Seat(W1, 1, True)])
    for worker in (W0, W1):
        dealer.perform(calls.Open(worker, 0, 4, b"", 32, 8))
    dealer.perform(calls.Take(W0, 0, 16, 0))
    dealer.crashed(crash(W0), begun)
    assert dealer.ledger.suspects(range(4)) == suspects


def test_more_crashes_may_be_asked_for() -> None:
    dealer = suspicious(bad_batch_kills=3)
    assert dealer.crashed(crash(W1)) == crash(W1)


@pytest.mark.parametrize("number", [1, 2, 15])
def test_a_signal_that_somebody_sends_accuses_no_batch(number: int) -> None:
    dealer = suspicious()
    assert dealer.crashed(crash(W1, signal=number)) == crash(W1, signal=number)
    assert dealer.crashed(crash(W1)).code == 5, "and this one is the second"


def test_samples_are_kept_of_suspects_only_and_not_without_end() -> None:
    dealer = suspicious()
    for batch in (1, 9, -1):
        dealer.know(Contents(epoch=0, batch=batch, **ME), packed(1))
    dealer.know(Contents(epoch=1, batch=0, **ME), packed(1))
    assert dealer.contents == {}
    dealer.know(Contents(epoch=0, batch=0, **ME), packed(*range(2 * MOST_SAMPLES)))
    assert dealer.contents == {(0, 0): tuple(range(MOST_SAMPLES))}
    with pytest.raises(Refusal, match="samples cannot be read"):
        dealer.know(Contents(epoch=0, batch=0, **ME), b"\xc1")


def test_a_worker_leaves_out_what_it_holds_and_only_where_the_job_says_so() -> None:
    skip = Skip(epoch=0, batch=0, because="the gradient of w is not finite", **ME)
    with pytest.raises(Refusal, match="--on-bad-batch skip"):
        suspicious().skip(skip, packed(3))
    dealer = suspicious(on_bad_batch="skip")
    assert dealer.skip(skip, packed(3)) == Ok() == dealer.skip(skip, packed(3))
    assert dealer.ledger.skipped == 1
    with pytest.raises(Refusal, match="which nobody holds"):
        dealer.skip(msgspec.structs.replace(skip, batch=1), packed(3))


async def ask(
    dealer: Dealer, results: list[Result] | bytes | None, attempt: str = "", holds: tuple[int, ...] = ()
) -> Any:
    message = Evaluate(epoch=0, number=1, batches=2, attempt=attempt, holds=list(holds), hold=False, **ME)
    raw = msgspec.msgpack.encode(results) if isinstance(results, list) else results
    return await dealer.evaluate(message, memoryview(raw) if raw is not None else None)


def run(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


def test_an_evaluation_over_messages() -> None:
    dealer = suspicious()
    first = run(ask(dealer, None))
    assert first == Evaluating("job", dealer.attempt, [0])
    assert run(ask(dealer, [Result(0, {"n": 0.1})], first.attempt)).batches == [1]
    reply, payload = run(ask(dealer, [Result(1, {"n": 0.2})], first.attempt))
    assert reply == Totals("job") and msgspec.msgpack.decode(payload) == {"n": 0.1 + 0.2}


def test_results_of_another_attempt_are_not_looked_at() -> None:
    dealer = suspicious()
    assert run(ask(dealer, b"\xc1", "former")) == Evaluating("job", dealer.attempt, [])
    assert not dealer.evaluations.going


@pytest.mark.parametrize("results", [b"\xc1", b"\x91\x01", [Result(7, {"n": 1.0})]])
def test_results_that_cannot_be_are_refused(results: Any) -> None:
    dealer = suspicious()
    run(ask(dealer, None))
    with pytest.raises(Refusal):
        run(ask(dealer, results, dealer.attempt))


def test_who_takes_training_batches_has_left_its_evaluation() -> None:
    dealer = suspicious()
    run(ask(dealer, None))
    take = Take(epoch=0, clock=0, most=1, have=1, hold=False, **ME)
    run(dealer.take(take, None))
    (evaluation,) = dealer.evaluations.going.values()
    assert evaluation.back == [0] and not evaluation.leases


def test_who_waits_for_batches_is_told_at_once_when_workers_come_or_go_for_it_must_rest_longer() -> None:
    dealer = Dealer(hall := Hall())
    dealer.members([Seat(W0, 1, True), Seat(W1, 1, True)])
    for worker in (W0, W1):
        dealer.perform(calls.Open(worker, 0, 1, b"", 8, 8))
    dealer.perform(calls.Take(W0, 0, 16, 0))
    pauses = 0

    async def somebody_joins(end: float) -> bool:
        nonlocal pauses
        pauses += 1
        dealer.members([Seat(W0, 1, True), Seat(W1, 1, True), Seat(WorkerId("w2"), 1, False)])
        dealer.perform(calls.Open(WorkerId("w2"), 0, 1, b"", 8, 8))
        return True

    hall.pause = somebody_joins  # type: ignore[method-assign]
    waits = run(dealer.take(Take(epoch=0, clock=0, most=1, have=0, hold=True, **ME), None))
    assert isinstance(waits, Wait) and (waits.waiting_for, waits.dealt_again, pauses) == (["w0"], True, 1)


def test_an_epoch_is_not_over_before_every_shard_has_counted_what_a_lost_worker_did() -> None:
    """Else the last parameters that a worker gets, and saves, lack a step that is in those of others."""
    dealer = Dealer(hall := Hall())
    dealer.members([Seat(W1, 1, True)])
    dealer.perform(calls.Open(W1, 0, 1, b"", 8, 8))
    dealer.perform(calls.Take(W1, 0, 16, 0))
    owed = Finished("w0", 1, 4, 0, 1, b"")
    hall.docket.owe("p1", owed)
    take = Take(epoch=0, clock=1, most=1, have=0, hold=True, **ME)
    waits = run(dealer.take(take, memoryview(msgspec.msgpack.encode([(0, 0)]))))
    assert isinstance(waits, Wait) and waits.waiting_for == ["p1"]
    hall.docket.paid("p1", owed)
    assert isinstance(run(dealer.take(take, None)), EpochOver)
