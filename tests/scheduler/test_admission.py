"""Who may come in, and who may speak."""

import pytest

from tests.scheduler.play import JOB, Play, running
from zml.scheduler.actions import Action, Admit, Fence, Grow, Ignored, Refuse
from zml.scheduler.events import DrainAsked, Exited, Loaded, Registered, Renewed, Returned
from zml.scheduler.ids import HIGHEST, Role, ShardId, WorkerId


def refused(actions: list[Action]) -> str:
    (refuse,) = actions
    assert isinstance(refuse, Refuse), refuse
    return refuse.because


def admitted(actions: list[Action]) -> tuple[str, int]:
    (admit,) = [action for action in actions if isinstance(action, Admit)]
    return admit.member, admit.incarnation


def test_newcomers_are_numbered_in_the_order_in_which_they_come() -> None:
    play = Play(3, 2)
    assert [admitted(play.join("worker", peer)) for peer in "ab"] == [("w0", 1), ("w1", 1)]
    assert [admitted(play.join("shard", peer)) for peer in "cd"] == [("p0", 1), ("p1", 1)]


def test_who_asks_for_an_id_by_name_gets_it() -> None:
    play = Play(3, 2)
    assert admitted(play.join("worker", "a", "w7")) == ("w7", 1)
    assert admitted(play.join("shard", "b", "p1")) == ("p1", 1)
    assert admitted(play.join("shard", "c")) == ("p0", 1)


def test_asking_twice_is_asking_once() -> None:
    play = Play(3, 1)
    first = play.join("worker", "a")
    again = Admit(JOB, "a", WorkerId("w0"), 1, 0, "this process is w0 already")
    assert play.join("worker", "a") == [again] and play.join("worker", "a", "w0") == [again]
    assert admitted(first) == ("w0", 1)
    assert play.machine.waiting_for(JOB) == "waiting for 2 of 3 workers and shard p0"


def test_one_process_is_not_two_members() -> None:
    play = Play(3, 1)
    play.join("worker", "a")
    assert refused(play.join("worker", "a", "w1")) == "this process is w0 already"
    assert refused(play.join("shard", "a")) == "this process is w0 already"


@pytest.mark.parametrize(
    ("role", "member", "because"),
    [
        ("worker", "p0", "'p0' names no worker: they are w0, w1, ..."),
        ("shard", "w0", "'w0' names no shard: they are p0, p1, ..."),
        ("worker", "../../etc/passwd", "'../../etc/passwd' names no worker: they are w0, w1, ..."),
        ("worker", "w" * 999, f"'{'w' * 20}' names no worker: they are w0, w1, ..."),
        ("shard", "p2", "job j has 2 shards: there is no p2"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(role: Role, member: str, because: str) -> None:
    assert refused(Play(1, 2).join(role, "a", member)) == because


def test_more_shards_than_asked_for_are_refused() -> None:
    play = Play(1, 1)
    play.join("shard", "a")
    assert refused(play.join("shard", "b")) == "job j has its 1 shard"


def test_a_running_job_takes_the_shard_with_the_next_number_and_no_other() -> None:
    play = running(1, 2)
    assert refused(play.join("shard", "c", "p3")) == (
        "job j has 2 shards: there is no p3; the next to join it is p2"
    )
    grown = play.join("shard", "c", "p2")
    assert grown[0] == Admit(JOB, "c", ShardId("p2"), 1, 1, "job j has a place for a shard")
    assert grown[1:] == [Grow(JOB, ShardId("p2"), 1, "p2 joined, and is to get its share")]
    assert play.machine.shards(JOB) == ["p0", "p1", "p2"] and play.machine.home(JOB, "p2") is not None
    assert play.join("shard", "c", "p2") == [
        Admit(JOB, "c", ShardId("p2"), 1, 1, "this process is p2 already")
    ], "twice is the same as once"
    assert isinstance(play.join("shard", "d", "p3")[1], Grow), "and so on"


def test_a_job_that_is_drained_does_not_grow() -> None:
    play = running(1, 2)
    play.tell(DrainAsked(JOB, "SIGTERM"))
    assert refused(play.join("shard", "c", "p2")) == "job j has 2 shards: there is no p2"


def test_a_shard_that_was_started_twice_does_not_steal_the_place_of_the_first() -> None:
    play = Play(1, 1)
    play.join("shard", "a")
    play.now += 0.3
    assert refused(play.join("shard", "b", "p0")) == "p0 is another process, which was heard 0.3 s ago"
    assert play.peer("p0") == "a"


def test_before_the_job_runs_a_silent_shard_can_be_replaced() -> None:
    play = Play(1, 1)
    play.join("shard", "a")
    play.now += 0.6
    again = "p0 joined again as incarnation 2"
    assert play.join("shard", "b", "p0") == [
        Fence(JOB, ShardId("p0"), 1, again),
        Admit(JOB, "b", ShardId("p0"), 2, 0, "job j has a place for a shard"),
    ]


def test_while_the_job_runs_a_shard_that_is_heard_keeps_its_place() -> None:
    play = running(1, 1)
    play.now += 0.3
    assert refused(play.join("shard", "b", "p0")) == "p0 is another process, which was heard 0.3 s ago"
    assert refused(play.join("shard", "b")) == "job j has its 1 shard"


def test_when_every_number_has_run_nobody_comes_without_a_name() -> None:
    play = Play(2, 1)
    play.machine.jobs[JOB].members._fresh = HIGHEST + 1
    assert refused(play.join("worker", "a")) == "job j has given out every worker's number"
    assert admitted(play.join("worker", "a", "w0")) == ("w0", 1)


def test_an_event_of_a_stranger_is_ignored_and_the_reason_is_told() -> None:
    play = running(1, 1)
    assert play.tell(Renewed(JOB, "w9", 1)) == [Ignored(JOB, "w9#1 was never a member")]
    assert play.tell(Registered(JOB, "", 1, "d", 1)) == [Ignored(JOB, "#1 was never a member")]


def test_a_worker_holds_no_chunks() -> None:
    assert running(1, 1).tell(Returned(JOB, "w0", 1, "d")) == [Ignored(JOB, "w0 holds no chunks")]


def test_a_shard_runs_no_script() -> None:
    play = running(1, 1)
    no = [Ignored(JOB, "p0 runs no script")]
    assert play.tell(Exited(JOB, "p0", 1, 1, 0, "")) == no
    assert play.tell(Loaded(JOB, "p0", 1)) == no
    assert play.tell(Registered(JOB, "p0", 1, "d", 1)) == no
