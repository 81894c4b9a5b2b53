"""Members: ids, incarnations, seniority."""

import pytest

from zml.scheduler.ids import HIGHEST, Name, Seat, WorkerId
from zml.scheduler.membership import Alive, Fate, Gone, Members, how_it_ended


def with_workers(*numbers: int) -> Members:
    members = Members()
    for number in numbers:
        members.admit(Name("worker", number), f"agent-{number}")
    return members


def test_a_newcomer_never_takes_the_id_of_a_dead_worker() -> None:
    members = with_workers(0, 1)
    members.end(WorkerId("w0"), Fate.LOST, "silent")
    assert members.free_worker() == Name("worker", 2)


def test_a_gap_that_a_wish_left_is_filled() -> None:
    members = with_workers(0, 2)
    assert members.free_worker() == Name("worker", 1)
    members.admit(Name("worker", 1), "agent")
    assert members.free_worker() == Name("worker", 3)


def test_numbers_come_to_an_end() -> None:
    members = Members()
    members._fresh = HIGHEST
    members.admit(Name("worker", HIGHEST), "agent")
    assert members.free_worker() is None


def test_the_place_of_a_dead_shard_is_free() -> None:
    members = Members()
    for number in (0, 1):
        members.admit(Name("shard", number), f"shard-{number}")
    assert members.free_shard(2) is None
    members.end(members.everybody()[0], Fate.LOST, "silent")
    assert members.free_shard(2) == Name("shard", 0)


def test_who_comes_again_is_the_next_incarnation_and_junior_to_all() -> None:
    members = with_workers(0, 1)
    members.end(WorkerId("w0"), Fate.LOST, "silent")
    members.admit(Name("worker", 0), "agent-new")
    assert members.seats() == (Seat(WorkerId("w1"), 1, False), Seat(WorkerId("w0"), 2, False))
    assert members.current("w0", 1) is None and members.current("w0", 2) == "w0"
    members.check()


def test_founders_are_sorted_by_number_and_senior_to_all_who_come_later() -> None:
    members = with_workers(10, 2, 1)
    members.found()
    members.admit(Name("worker", 0), "late")
    assert members.workers() == ["w1", "w2", "w10", "w0"]
    assert [seat.founder for seat in members.seats()] == [True, True, True, False]
    members.check()


def test_one_process_is_one_member() -> None:
    members = with_workers(0)
    assert members.at_peer("agent-0") == "w0" and members.at_peer("stranger") is None
    with pytest.raises(AssertionError):
        members.admit(Name("worker", 1), "agent-0")
    members.end(WorkerId("w0"), Fate.DONE, "")
    members.admit(Name("worker", 1), "agent-0")
    assert members.at_peer("agent-0") == "w1"


@pytest.mark.parametrize(
    ("member", "incarnation", "because"),
    [
        ("w7", 1, "w7#1 was never a member"),
        ("nonsense" * 99, 1, "nonsensenonsensenons#1 was never a member"),
        ("w0", 3, "w0#3 was never a member"),
        ("w0", 0, "w0#0 was never a member"),
        ("w0", 1, "w0#1 is over: w0#2 took its place"),
        ("w1", 1, "w1#1 is over: it was lost"),
    ],
)
def test_who_is_not_a_member_is_told_why(member: str, incarnation: int, because: str) -> None:
    members = with_workers(0, 1)
    for worker in ("w0", "w1"):
        members.end(WorkerId(worker), Fate.LOST, "silent")
    members.admit(Name("worker", 0), "agent-new")
    assert members.current(member, incarnation) is None
    assert members.why_not(member, incarnation) == because


def test_the_first_loss_of_a_worker_is_kept() -> None:
    members = with_workers(0, 1, 2)
    members.end(WorkerId("w2"), Fate.DONE, "its script finished")
    first = members.end(WorkerId("w1"), Fate.LOST, "its script was killed by SIGKILL", 137)
    members.end(WorkerId("w0"), Fate.LOST, "silent", 4)
    assert members.first_loss == first


def test_an_end_is_a_sentence() -> None:
    assert (
        how_it_ended(WorkerId("w1"), Gone(1, Fate.LOST, "silent for 1.2 s"))
        == "w1 was lost: silent for 1.2 s"
    )
    assert how_it_ended(WorkerId("w1"), Gone(1, Fate.DONE, "")) == "w1 finished"


def test_the_check_sees_a_member_that_lives_only_in_the_records() -> None:
    members = with_workers(0)
    members.records[WorkerId("w1")] = Alive(1, "agent-1", 7)
    with pytest.raises(AssertionError):
        members.check()
