"""The journal and what is read out of it: whole, or refused with the place; one owner; no forgotten record."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.coordinator.docket import LEDGER_STATE, NEWS, Docket
from zml.coordinator.facts import Begun, Entered, Failed, Listening, Progressed, Shown
from zml.errors import HELD, JOURNAL, ZmlError
from zml.journal import Journal
from zml.messages import Failure, JobSpec
from zml.scheduler import calls
from zml.scheduler.batches import Ledger
from zml.scheduler.events import (
    Cancelled,
    Died,
    DrainAsked,
    Exited,
    Joined,
    Left,
    Loaded,
    Registered,
    Submitted,
)
from zml.scheduler.ids import JobId, Seat, WorkerId
from zml.scheduler.machine import Machine
from zml.scheduler.rules import Rules
from zml.status import MemberFailure

JOB = JobId("j")
W0, W1 = WorkerId("w0"), WorkerId("w1")


class Clock:
    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def opened(folder: Path, clock: Clock | None = None, **options: Any) -> Docket:
    return Docket(JOB, Machine(Rules()), Journal(folder, **options), clock or Clock())


def close(docket: Docket) -> None:
    assert docket.journal is not None
    docket.journal.close()


def state(docket: Docket) -> bytes:
    """All but the time."""
    return msgspec.msgpack.encode({**docket.snapshot(), "time": 0})


def live(docket: Docket) -> None:
    """A short life with something of everything."""
    docket.fact(Begun(JOB, JobSpec(script="train.py", workers=2), 1.5, 0.15, 1e9))
    docket.fact(Listening(["tcp://127.0.0.1:7077"], 7, "here", 1e9))
    docket.event(Submitted(JOB, 2, 1, 0))
    for role, peer in (("shard", "shard-0"), ("worker", "agent-0"), ("worker", "agent-1")):
        docket.event(Joined(JOB, role, "", peer))  # type: ignore[arg-type]
    docket.fact(Entered("p0", 1, "shard", "here", "cpu", ["tcp://127.0.0.1:9"]))
    seats = (Seat(W0, 1, True), Seat(W1, 1, True))
    docket.perform(calls.Members(seats))
    docket.spoke("w0", "w0.1")
    docket.fact(Shown(b"layout"))
    docket.event(Registered(JOB, "w0", 1, "digest", 4))
    docket.event(Loaded(JOB, "w0", 1))
    docket.perform(calls.Open(W0, 0, 7, b"token"))
    docket.perform(calls.Take(W0, 0, 2, 0))
    docket.perform(calls.Reached(0, 1))
    docket.perform(calls.Commit(W0, 0, (0,)))
    assert docket.claim("model", "w1") == "w1"
    docket.fact(Failed(MemberFailure(member="w1", failure=Failure(kind="SIGKILL"))))
    docket.fact(Progressed({"w0": (9, 0)}, 2, 1.5))
    docket.event(Exited(JOB, "w1", 1, 0, 9, "its script was killed"))
    docket.perform(calls.Members(seats[:1]))


def test_what_was_decided_is_read_again_and_is_the_same(tmp_path: Path) -> None:
    clock = Clock()
    docket = opened(tmp_path, clock)
    live(docket)
    assert docket.claim("model", "w0") == "w0", "w1 did not come to the end of its script"
    expected = state(docket)
    close(docket)
    again = opened(tmp_path, Clock(5.0))
    assert again.resumed and again.job == JOB and again.loaded
    assert state(again) == expected
    assert again.now == 100.0, (
        "the machine's time goes on from the last record, whatever the clock of this machine"
    )
    again.machine.watch(again.now, 5.0)
    again.machine.check()
    again.ledger.check()
    close(again)


def test_a_death_and_which_process_was_which_member_are_read_again(tmp_path: Path) -> None:
    docket = opened(tmp_path)
    live(docket)
    docket.fact(Entered("w0", 1, "worker", "here", "cpu", [], pid=77))
    docket.event(Died(JOB, "w0", 1, "its process ended by SIGKILL"))
    expected = state(docket)
    close(docket)
    again = opened(tmp_path, Clock(5.0))
    assert state(again) == expected
    assert again.facts.entered["w0"].pid == 77
    assert not again.machine.is_current(JOB, "w0", 1)
    close(again)


def test_what_changes_nothing_is_not_written(tmp_path: Path) -> None:
    docket = opened(tmp_path)
    live(docket)
    assert docket.journal is not None
    before = docket.journal._records.next
    docket.event(Joined(JOB, "shard", "p0", "another"))
    docket.event(Exited(JOB, "w7", 1, 0, 0, "who?"))
    docket.event(Died(JOB, "w1", 1, "its process ended, and so had its script before"))
    docket.perform(calls.Take(W0, 0, 2, 0))  # again, for the answer was lost
    docket.perform(calls.Commit(W0, 0, (0,)))
    docket.perform(calls.Reached(0, 1))
    docket.perform(calls.Open(W0, 0, 7, b"token"))
    docket.perform(calls.Members((Seat(W0, 1, True),)))
    docket.spoke("w0", "w0.1")
    assert docket.journal._records.next == before
    close(docket)


CALLS: list[Callable[[Docket], object]] = [
    lambda d: d.event(Joined(JOB, "worker", "", "agent-9")),
    lambda d: d.event(Joined(JOB, "worker", "w0", "agent-8")),
    lambda d: d.event(Left(JOB, "w1", 1, "bye")),
    lambda d: d.event(Exited(JOB, "w0", 1, 0, 0, "its script finished")),
    lambda d: d.event(DrainAsked(JOB, "Ctrl-C")),
    lambda d: d.event(Cancelled(JOB, "Ctrl-C")),
    lambda d: d.perform(calls.Open(W0, 0, 7, b"token")),
    lambda d: d.perform(calls.Open(W0, 1, 7, b"token 1")),
    lambda d: d.perform(calls.Take(W0, 0, 3, None)),
    lambda d: d.perform(calls.Take(W0, 0, 3, 0)),
    lambda d: d.perform(calls.Commit(W0, 0, tuple(d.ledger.current.leases) if d.ledger.current else ())),
    lambda d: d.perform(calls.Reached(0, 5)),
    lambda d: d.perform(calls.Drain("Ctrl-C")),
    lambda d: d.claim("model", "w0"),
    lambda d: d.spoke("w0", "w0.2"),
    lambda d: d.fact(Progressed({"w0": (12, 9)}, 1, 0.5)),
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(CALLS) - 1), st.sampled_from([0.0, 0.2, 3.0])), max_size=30))
def test_at_every_moment_the_files_hold_the_state(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    """Snapshots, too: with 300 bytes of records there are many."""
    folder, clock = tmp_path_factory.mktemp("journal"), Clock()
    docket = opened(folder, clock, snapshot_bytes=300)
    live(docket)
    for number, seconds in steps:
        clock.now += seconds
        if W0 in docket.ledger.incarnations:
            CALLS[number](docket)
        while (finding := docket.machine.finding(docket.now)) is not None:
            docket.event(finding)
        expected = state(docket)
        close(docket)
        before, clock = docket.now, Clock(clock.now)
        docket = opened(folder, clock, snapshot_bytes=300)
        assert state(docket) == expected
        assert docket.now <= before
        docket.machine.watch(docket.now, 5.0)
    close(docket)


def test_a_snapshot_makes_the_journal_short_and_an_older_one_stands_in_for_it(tmp_path: Path) -> None:
    docket = opened(tmp_path, snapshot_bytes=2000)
    live(docket)
    for number in range(400):
        docket.claim(f"file {number % 40}", f"w{number % 3}")
        docket.perform(calls.Reached(0, number))
    expected = state(docket)
    close(docket)
    snapshots = sorted(tmp_path.glob("*.snapshot"))
    assert len(snapshots) == 2
    assert sum(path.stat().st_size for path in tmp_path.glob("*.records")) < 8000
    data = bytearray(snapshots[1].read_bytes())
    data[-1] ^= 1
    snapshots[1].write_bytes(data)
    again = opened(tmp_path)
    assert state(again) == expected
    close(again)
    snapshots[0].write_bytes(b"")
    with pytest.raises(ZmlError) as caught:
        opened(tmp_path)
    assert caught.value.code == JOURNAL
    assert str(snapshots[0]) in caught.value.what and "move it away" in caught.value.fix


def test_a_torn_tail_is_cut_and_damage_is_refused_with_its_place(tmp_path: Path) -> None:
    docket = opened(tmp_path)
    live(docket)
    close(docket)
    (path,) = tmp_path.glob("*.records")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    torn = opened(tmp_path)
    assert torn.ledger.incarnations == {W0: 1, W1: 1}, "the last record, which nobody was told of, is gone"
    close(torn)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ZmlError) as caught:
        opened(tmp_path)
    assert caught.value.code == JOURNAL and str(path) in caught.value.what and "at byte" in caught.value.what
    path.write_bytes(whole)
    close(opened(tmp_path))  # a refusal has let the folder go


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("event.Exploded", {}, "its kind is not known"),
        ("weather", {}, "its kind is not known"),
        ("event.Left", {"job": "j"}, "Left needs 'member'"),
        ("ledger.Take", {"worker": "w0"}, "Take needs 'epoch'"),
        ("fact.Shown", {"registration": 3}, "Expected `bytes`"),
        ("ledger.Take", {"worker": "w9", "epoch": 0, "most": 1, "have": 0, "clock": 0}, "does not follow"),
    ],
)
def test_a_record_that_cannot_be_is_named(tmp_path: Path, kind: str, fields: Any, said: str) -> None:
    docket = opened(tmp_path)
    live(docket)
    assert docket.journal is not None
    number = docket.journal._records.next
    docket.journal.write(kind, 1.0, fields)
    close(docket)
    with pytest.raises(ZmlError) as caught:
        opened(tmp_path)
    assert caught.value.code == JOURNAL
    assert f"record {number} of {tmp_path}" in caught.value.what and said in caught.value.what
    assert kind in caught.value.what


def test_one_at_a_time_holds_the_folder_and_the_other_is_told_who(tmp_path: Path) -> None:
    one = Journal(tmp_path)
    with pytest.raises(ZmlError) as caught:
        Journal(tmp_path)
    assert caught.value.code == HELD
    assert f"process {os.getpid()} on {os.uname().nodename}" in caught.value.what
    one.close()
    Journal(tmp_path).close()


def test_what_there_was_no_room_for_is_written_in_order_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docket = opened(tmp_path)
    live(docket)
    assert docket.settled() and not docket.trouble
    write = os.pwritev

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    docket.perform(calls.Reached(0, 40))
    docket.perform(calls.Reached(0, 50))
    assert not docket.settled()
    assert str(tmp_path) in docket.trouble and "no room" in docket.trouble
    monkeypatch.setattr(os, "pwritev", write)
    assert docket.settled() and not docket.trouble
    expected = state(docket)
    close(docket)
    again = opened(tmp_path)
    assert state(again) == expected and again.ledger.current is not None
    assert again.ledger.current.furthest == 50
    close(again)


def test_everything_that_a_ledger_has_is_in_a_snapshot() -> None:
    assert vars(Ledger()).keys() == {*LEDGER_STATE, NEWS}


def test_who_finds_a_folder_held_is_told_the_flag_by_which_it_was_chosen(tmp_path: Path) -> None:
    held = Journal(tmp_path)
    with pytest.raises(ZmlError) as caught:
        Journal(tmp_path, flag="--cluster")
    assert caught.value.fix == "Wait for it, end it, or give this one another --cluster."
    held.close()
