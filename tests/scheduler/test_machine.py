"""The machine: what it orders, in which order, and why."""

import re
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.scheduler.play import JOB, Play, running
from zml.scheduler import machine as machine_module
from zml.scheduler.actions import (
    Action,
    Admit,
    Announce,
    Await,
    Drain,
    Fence,
    Finish,
    Ignored,
    Initialise,
    Launch,
    Place,
    Refuse,
    Rehome,
    Stop,
)
from zml.scheduler.events import (
    Cancelled,
    Died,
    DrainAsked,
    Event,
    Exited,
    Joined,
    Left,
    Loaded,
    Registered,
    Renewed,
    Returned,
    Submitted,
    Ticked,
    TimeUp,
)
from zml.scheduler.ids import JobId, Role, Seat, ShardId, WorkerId
from zml.scheduler.machine import MOST_CHUNKS, Machine, table
from zml.scheduler.rules import Rules
from zml.scheduler.state import State

W0, W1, W2, W3 = (WorkerId(f"w{n}") for n in range(4))
P0, P1 = ShardId("p0"), ShardId("p1")


def finished(worker: WorkerId, incarnation: int = 1) -> Exited:
    return Exited(JOB, worker, incarnation, 0, 0, "its script finished")


def failed(worker: WorkerId, code: int = 3) -> Exited:
    return Exited(JOB, worker, 1, code, 0, "its script raised ValueError: boom (train.py:12)")


def killed(worker: WorkerId, incarnation: int = 1, *, returns: bool = False) -> Exited:
    return Exited(JOB, worker, incarnation, 0, 9, "its script was killed by SIGKILL", returns)


KILLED = "its process ended by SIGKILL"


def died(member: str, incarnation: int = 1) -> Died:
    return Died(JOB, member, incarnation, KILLED)


def test_the_table_in_the_docstring_is_the_table() -> None:
    assert table() in (machine_module.__doc__ or "")


# -- beginning -------------------------------------------------------------------------------------------


def test_a_job_begins_when_all_workers_and_shards_are_members() -> None:
    play = Play(2, 1)
    place = "job j has a place for a"
    assert play.join("worker", "a") == [
        Admit(JOB, "a", W0, 1, 0, f"{place} worker"),
        Launch(JOB, W0, 1, "w0#1 joined"),
    ]
    assert play.join("shard", "s") == [Admit(JOB, "s", P0, 1, 0, f"{place} shard")]
    because = "2 workers and 1 shard are here"
    assert play.join("worker", "b") == [
        Admit(JOB, "b", W1, 1, 0, f"{place} worker"),
        Launch(JOB, W1, 1, "w1#1 joined"),
        Announce(JOB, 1, (Seat(W0, 1, True), Seat(W1, 1, True)), because),
    ]
    assert play.state() == "RUNNING"


def test_a_script_that_comes_to_its_end_before_the_job_begins_is_not_waited_for() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    play.join("worker", "b")
    stop = Stop(JOB, W0, "its script finished")
    assert play.tell(finished(W0)) == [stop]
    assert play.machine.waiting_for(JOB) == "waiting for shard p0"
    assert play.machine.missing(JOB) == ["shard p0"]
    announce = play.join("shard", "s")[1]
    assert isinstance(announce, Announce)
    assert announce.seats == (Seat(W1, 1, True),)
    assert play.machine.missing(JOB) == []


def test_the_last_one_asked_for_may_be_one_that_ends() -> None:
    play = Play(2, 1)
    play.join("shard", "s")
    play.join("worker", "a")
    play.tell(finished(W0))
    assert [type(action) for action in play.join("worker", "b")] == [Admit, Launch, Announce]
    play = Play(3, 1)
    play.join("shard", "s")
    for peer in ("a", "b"):
        play.join("worker", peer)
    assert play.tell(finished(W0)) == [Stop(JOB, W0, "its script finished")]
    assert play.state() == "FORMING", "the third is to come"


def test_a_job_whose_scripts_all_end_before_it_begins_is_over() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    play.tell(finished(W0))
    assert play.state() == "FORMING", "another one is to come"
    play.join("worker", "b")
    assert play.tell(finished(W1))[-1] == Finish(JOB, State.SUCCEEDED, 0, "all 2 workers finished")


def test_a_job_with_more_workers_than_asked_for_does_not_begin_without_any() -> None:
    play = Play(1, 1)
    play.join("worker", "a")
    play.join("worker", "b")
    play.tell(finished(W0))
    assert play.state() == "FORMING", "w1 computes, once the shard is here"
    assert play.tell(died("w1"))[-1] == Finish(
        JOB, State.SUCCEEDED, 0, f"1 of 2 workers finished; w1 was lost: {KILLED}"
    )


def test_a_script_that_fails_before_the_job_begins_ends_it() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    actions = play.tell(failed(W0))
    because = "w0 failed: its script raised ValueError: boom (train.py:12)"
    assert actions == [
        Stop(JOB, W0, "its script raised ValueError: boom (train.py:12)"),
        Finish(JOB, State.FAILED, 3, because),
    ]


def test_a_script_that_is_killed_before_the_job_begins_is_waited_for_if_it_comes_again() -> None:
    play = Play(1, 1)
    play.join("worker", "a")
    play.tell(killed(W0, returns=True))
    assert play.machine.waiting_for(JOB) == "waiting for 1 of 1 worker and shard p0"
    assert play.join("worker", "again", "w0")[1:] == [Launch(JOB, W0, 2, "w0#2 joined")]
    actions = play.tell(killed(W0, incarnation=2))
    because = "0 of 1 worker finished; w0 was lost: its script was killed by SIGKILL"
    assert actions[-1] == Finish(JOB, State.FAILED, 137, because)


def test_a_worker_that_leaves_before_the_job_begins_is_waited_for_again() -> None:
    play = Play(1, 1)
    play.join("worker", "a")
    play.tell(Left(JOB, W0, 1, "SIGTERM on its machine"))
    assert play.machine.waiting_for(JOB) == "waiting for 1 of 1 worker and shard p0"


def test_founders_are_seated_by_number_in_whatever_order_they_came() -> None:
    play = Play(3, 1)
    for member in ("w2", "w0", "w1"):
        play.join("worker", f"agent of {member}", member)
    announce = play.join("shard", "s")[1]
    assert isinstance(announce, Announce)
    assert [seat.worker for seat in announce.seats] == ["w0", "w1", "w2"]


def test_more_workers_than_asked_for_found_the_job_too() -> None:
    play = Play(1, 1)
    for peer in ("a", "b", "c"):
        play.join("worker", peer)
    play.join("shard", "s")
    assert play.machine.workers(JOB) == ["w0", "w1", "w2"]


def test_who_is_lost_before_the_job_begins_is_fenced_and_waited_for_again() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    play.join("worker", "b")
    assert play.fall_silent("w0") == [Fence(JOB, W0, 1, "silent for 1.0 s")]
    assert play.machine.waiting_for(JOB) == "waiting for 1 of 2 workers and shard p0"
    play.join("shard", "s")
    announce = play.join("worker", "c")[2]
    assert isinstance(announce, Announce)
    assert announce.seats == (Seat(W1, 1, True), Seat(W2, 1, True)), "w2: w0's number is not given out again"


def test_a_forming_job_has_no_deadline_of_its_own() -> None:
    play = Play(2, 1)
    assert play.machine.next_deadline() is None
    play.join("worker", "a")
    assert play.wait(3600) == []
    assert play.state() == "FORMING"


def test_a_job_is_submitted_once() -> None:
    play = Play(2, 1)
    assert play.tell(Submitted(JOB, 9, 9, None)) == [Ignored(JOB, "job j was submitted before")]
    assert play.machine.waiting_for(JOB) == "waiting for 2 of 2 workers and shard p0"


# -- coming late -----------------------------------------------------------------------------------------


def test_a_worker_that_comes_late_is_announced_in_a_new_generation_and_is_no_founder() -> None:
    play = running(1, 1)
    because = "w1#1 joined"
    assert play.join("worker", "late") == [
        Admit(JOB, "late", W1, 1, 2, "job j has a place for a worker"),
        Announce(JOB, 2, (Seat(W0, 1, True), Seat(W1, 1, False)), because),
        Launch(JOB, W1, 1, because),
    ]


def test_a_restarted_worker_fences_its_former_self() -> None:
    play = running(2, 1)
    assert play.join("worker", "new", "w0") == [
        Fence(JOB, W0, 1, "w0 joined again as incarnation 2"),
        Admit(JOB, "new", W0, 2, 2, "job j has a place for a worker"),
        Announce(JOB, 2, (Seat(W1, 1, True), Seat(W0, 2, False)), "w0#2 joined"),
        Launch(JOB, W0, 2, "w0#2 joined"),
    ]
    assert play.tell(Renewed(JOB, "w0", 1)) == [Ignored(JOB, "w0#1 is over: w0#2 took its place")]
    assert play.machine.generation(JOB) == 2
    assert not play.machine.is_current(JOB, "w0", 1) and play.machine.is_current(JOB, "w0", 2)


def test_a_lost_worker_may_come_again() -> None:
    play = running(2, 1)
    play.fall_silent("w0")
    admit = play.join("worker", "new", "w0")[0]
    assert isinstance(admit, Admit) and (admit.member, admit.incarnation, admit.generation) == ("w0", 2, 3)


def test_nobody_is_let_into_a_job_that_ends() -> None:
    play = running(2, 1)
    play.tell(DrainAsked(JOB, "Ctrl-C"))
    assert play.join("worker", "late") == [Refuse(JOB, "late", "job j is being drained: Ctrl-C")]
    play.tell(failed(W0))
    cause = "w0 failed: its script raised ValueError: boom (train.py:12)"
    assert play.join("worker", "late") == [Refuse(JOB, "late", f"job j is finishing: {cause}")]
    play.tell(Left(JOB, "w1", 1, ""))
    play.tell(Left(JOB, "p0", 1, ""))
    assert play.join("worker", "late") == [Refuse(JOB, "late", f"job j is over (FAILED: {cause})")]


def test_nobody_is_let_into_a_job_that_is_not_there() -> None:
    other = JobId("other")
    assert Play(1, 1).tell(Joined(other, "worker", "", "a")) == [Refuse(other, "a", "there is no job other")]


# -- the parameters --------------------------------------------------------------------------------------


def test_the_first_layout_is_placed_and_the_most_senior_worker_initialises() -> None:
    play = running(2, 2)
    because = "w1 shows a model of 4 chunks"
    place, initialise = play.register("w1", chunks=4)
    assert isinstance(place, Place) and Counter(place.placement) == {0: 2, 1: 2} and place.because == because
    assert initialise == Initialise(JOB, W0, because)
    assert play.register("w0") == [] and play.register("w1") == [], "the same layout says nothing new"


def test_another_layout_ends_the_job_and_names_both() -> None:
    play = running(2, 1)
    play.register("w1", digest="d")
    because = "w0 and w1 show different models or optimizers"
    assert play.register("w0", digest="e") == [
        Refuse(JOB, "agent-0", because),
        Stop(JOB, W0, because),
        Stop(JOB, W1, because),
        Stop(JOB, P0, because),
    ]


@pytest.mark.parametrize("chunks", [-1, 0, MOST_CHUNKS + 1, 10**15])
def test_a_number_of_chunks_that_cannot_be_is_refused_before_anything_is_allocated(chunks: int) -> None:
    play = running(1, 1)
    refuse, *_ = play.register("w0", chunks=chunks)
    assert refuse == Refuse(
        JOB, "agent-0", f"w0 shows a model of {chunks:,} chunks, of 1 to 1,000,000 possible"
    )
    assert play.state() == "FINISHING"


def test_if_the_initialiser_is_lost_the_next_in_seniority_initialises() -> None:
    play = running(3, 1)
    play.register("w2")
    actions = play.fall_silent("w0")
    assert actions[-1] == Initialise(JOB, W1, "w0 was lost: silent for 1.0 s")
    assert play.tell(Loaded(JOB, "w2", 1)) == [Ignored(JOB, "w2 was not asked to bring the first parameters")]
    assert play.tell(Loaded(JOB, "w1", 1)) == [] and play.tell(Loaded(JOB, "w1", 1)) == []
    assert not any(isinstance(action, Initialise) for action in play.fall_silent("w1"))


def test_a_restarted_initialiser_is_junior_and_hands_over() -> None:
    play = running(2, 1)
    play.register("w0")
    assert Initialise(JOB, W1, "w0#2 joined") in play.join("worker", "new", "w0")


def test_the_only_worker_initialises_again_when_it_is_restarted() -> None:
    play = running(1, 1)
    play.register("w0")
    assert Initialise(JOB, W0, "w0#2 joined") in play.join("worker", "new", "w0")


# -- going on without ------------------------------------------------------------------------------------


def test_a_silent_worker_is_fenced_and_the_others_go_on() -> None:
    play = running(3, 1)
    assert play.fall_silent("w1") == [
        Fence(JOB, W1, 1, "silent for 1.0 s"),
        Announce(JOB, 2, (Seat(W0, 1, True), Seat(W2, 1, True)), "w1 was lost: silent for 1.0 s"),
    ]


def test_a_worker_whose_process_died_is_fenced_at_once_and_the_others_go_on() -> None:
    play = running(3, 1)
    assert play.tell(died("w1")) == [
        Fence(JOB, W1, 1, KILLED),
        Announce(JOB, 2, (Seat(W0, 1, True), Seat(W2, 1, True)), f"w1 was lost: {KILLED}"),
    ]
    assert play.tell(died("w1")) == [Ignored(JOB, "w1#1 is over: it was lost")], "twice is the same as once"
    assert play.wait(2.0) == [], "and its lease is over with it"


def test_a_death_that_is_told_late_does_not_touch_the_next_incarnation() -> None:
    play = running(2, 1)
    play.join("worker", "again", "w1")
    assert play.tell(died("w1")) == [Ignored(JOB, "w1#1 is over: w1#2 took its place")]
    assert play.machine.seats(JOB) == (Seat(W0, 1, True), Seat(W1, 2, False))


def test_a_worker_that_was_fenced_because_it_died_comes_back_as_the_next_incarnation() -> None:
    play = running(2, 1)
    play.tell(died("w1"))
    play.join("worker", "again", "w1")
    assert play.machine.seats(JOB) == (Seat(W0, 1, True), Seat(W1, 2, False))


def test_the_last_worker_that_died_is_waited_for() -> None:
    play = running(1, 1)
    assert play.tell(died("w0")) == [
        Fence(JOB, W0, 1, KILLED),
        Announce(JOB, 2, (), f"w0 was lost: {KILLED}"),
    ]
    assert play.wait(50) == []
    play.join("worker", "again", "w0")
    assert play.machine.seats(JOB) == (Seat(W0, 2, False),)


def test_who_died_after_its_goodbye_has_left_in_order() -> None:
    play = running(2, 1)
    play.tell(Left(JOB, "w1", 1, "SIGTERM on this machine"))
    assert play.tell(died("w1")) == [Ignored(JOB, "w1#1 is over: it left")]
    play.tell(finished(W0))
    assert play.tell(died("p0")) == [
        Finish(JOB, State.SUCCEEDED, 0, "1 of 2 workers finished; w1 left: SIGTERM on this machine")
    ]


def test_who_died_before_the_job_begins_is_waited_for_again() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    assert play.tell(died("w0")) == [Fence(JOB, W0, 1, KILLED)]
    assert play.machine.waiting_for(JOB) == "waiting for 2 of 2 workers and shard p0"


def test_members_that_die_when_told_to_stop_are_not_waited_for() -> None:
    play = running(1, 1)
    play.tell(finished(W0))
    assert play.tell(died("p0")) == [Finish(JOB, State.SUCCEEDED, 0, "the worker finished")]


def test_a_worker_that_leaves_in_order_is_not_fenced() -> None:
    play = running(2, 1)
    because = "w1 left: SIGTERM on this machine"
    assert play.tell(Left(JOB, "w1", 1, "SIGTERM on this machine")) == [
        Announce(JOB, 2, (Seat(W0, 1, True),), because)
    ]


def test_a_script_that_was_killed_is_lost_and_the_others_go_on() -> None:
    play = running(2, 1)
    assert play.tell(killed(W1)) == [
        Stop(JOB, W1, "its script was killed by SIGKILL"),
        Announce(JOB, 2, (Seat(W0, 1, True),), "w1 was lost: its script was killed by SIGKILL"),
    ]


def test_a_worker_that_finishes_first_is_not_waited_for() -> None:
    play = running(2, 1)
    assert play.tell(finished(W1)) == [
        Stop(JOB, W1, "its script finished"),
        Announce(JOB, 2, (Seat(W0, 1, True),), "w1 finished"),
    ]


def test_a_heartbeat_that_comes_just_in_time_counts_before_the_lease_is_looked_at() -> None:
    play = running(1, 1)
    play.now += 1.1
    assert play.tell(Renewed(JOB, "w0", 1)) != [], "p0 was silent, and its lease is over"
    assert play.machine.is_current(JOB, "w0", 1)


def test_the_deadline_is_the_earliest_lease_end_and_then_the_patience_of_a_goodbye() -> None:
    play = running(1, 1)
    assert play.machine.next_deadline() == pytest.approx(play.now + 1.0)
    play.wait(5.0)
    play.now += 0.25
    play.hear("w0")
    assert play.machine.next_deadline() == pytest.approx(play.now + 0.75)
    play.tell(Cancelled(JOB, "Ctrl-C"))
    play.hear("p0")
    assert play.machine.next_deadline() == pytest.approx(play.now + 1.0)
    play.tell(Left(JOB, "w0", 1, ""))
    play.tell(Left(JOB, "p0", 1, ""))
    assert play.machine.next_deadline() is None


def give_up(play: Play) -> None:
    """It is just the time at which a job does not wait any longer for a worker to come back."""
    play.now += 0.5
    (stop,) = play.tell(Ticked(JOB))
    assert isinstance(stop, Stop) and stop.member == "p0"


# -- coming back -----------------------------------------------------------------------------------------


def test_a_script_that_its_agent_starts_again_is_lost_and_its_agent_not_stopped() -> None:
    play = running(2, 1)
    because = "its script was killed by SIGKILL"
    assert play.tell(killed(W1, returns=True)) == [
        Announce(JOB, 2, (Seat(W0, 1, True),), f"w1 was lost: {because}")
    ]
    assert play.tell(Joined(JOB, "worker", "w1", "agent-1", former=1)) == [
        Admit(JOB, "agent-1", W1, 2, 3, "job j has a place for a worker"),
        Announce(JOB, 3, (Seat(W0, 1, True), Seat(W1, 2, False)), "w1#2 joined"),
        Launch(JOB, W1, 2, "w1#2 joined"),
    ]


def test_a_job_without_a_worker_waits_for_a_lost_one_to_come_back() -> None:
    play = running(1, 1)
    play.register("w0")
    play.tell(Loaded(JOB, "w0", 1))
    assert play.fall_silent("w0") == [
        Fence(JOB, W0, 1, "silent for 1.0 s"),
        Announce(JOB, 2, (), "w0 was lost: silent for 1.0 s"),
    ]
    assert (play.state(), play.machine.waiting_for(JOB)) == ("RUNNING", "waiting for w0 to come back")
    assert play.wait(55.0) == []
    assert play.join("worker", "new", "w0")[1:] == [
        Announce(JOB, 3, (Seat(W0, 2, False),), "w0#2 joined"),
        Launch(JOB, W0, 2, "w0#2 joined"),
    ]
    assert play.machine.waiting_for(JOB) == ""
    assert play.wait(3600.0) == [], "it is waited for no more"


def test_the_first_worker_to_come_back_brings_the_first_parameters_that_a_lost_one_did_not() -> None:
    play = running(2, 1)
    play.register("w0")
    play.fall_silent("w0", "w1")
    actions = play.join("worker", "new", "w1")
    assert Initialise(JOB, W1, "w1#2 joined") in actions


def test_if_nobody_comes_back_in_time_the_job_ends_as_it_would_have_at_once() -> None:
    play = running(1, 1)
    play.tell(killed(W0, returns=True))
    assert play.wait(59.5) == []
    assert play.machine.next_deadline() == pytest.approx(play.now + 0.5)
    play.now += 0.5
    because = "0 of 1 worker finished; w0 was lost: its script was killed by SIGKILL"
    assert play.tell(Ticked(JOB)) == [Stop(JOB, P0, because)]
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.FAILED, 128 + 9, because)]


def test_a_worker_that_leaves_last_ends_the_job_in_order_and_it_is_safe_to_run_again() -> None:
    play = running(2, 1)
    play.tell(killed(W0))
    because = "0 of 2 workers finished; w0 was lost: its script was killed by SIGKILL; w1 left: SIGTERM"
    assert play.tell(Left(JOB, "w1", 1, "SIGTERM")) == [Stop(JOB, P0, because)]
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.CANCELLED, 75, because)]


def test_when_the_last_worker_leaves_one_that_was_just_lost_is_still_waited_for() -> None:
    play = running(2, 1)
    play.tell(killed(W0, returns=True))
    play.wait(20.0)
    assert play.tell(Left(JOB, "w1", 1, "SIGTERM")) == [Announce(JOB, 3, (), "w1 left: SIGTERM")]
    assert play.machine.waiting_for(JOB) == "waiting for w0 to come back"
    play.wait(39.5)
    give_up(play)
    play.tell(Left(JOB, "p0", 1, ""))
    assert (play.state(), play.machine.exit_code(JOB)) == ("CANCELLED", 75), "the last one left in order"


def test_whoever_has_finished_has_seen_the_job_to_its_end() -> None:
    play = running(2, 1)
    play.tell(finished(W0))
    play.fall_silent("w1")
    assert play.state() == "FINISHING", "nothing is left to do for w1"


def test_nobody_is_waited_for_in_a_job_that_is_drained() -> None:
    play = running(1, 1)
    play.tell(DrainAsked(JOB, "Ctrl-C"))
    play.fall_silent("w0")
    assert play.state() == "FINISHING"


def test_a_job_that_waits_for_a_worker_ends_when_a_drain_or_an_end_is_asked_for() -> None:
    for event, code in ((DrainAsked(JOB, "Ctrl-C"), 75), (Cancelled(JOB, "Ctrl-C"), 130)):
        play = running(1, 1)
        play.fall_silent("w0")
        assert play.tell(event) == [Stop(JOB, P0, "Ctrl-C")]
        assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.CANCELLED, code, "Ctrl-C")]


def test_a_process_that_wakes_up_does_not_fence_the_one_that_took_its_place() -> None:
    play = running(2, 1)
    play.fall_silent("w0")
    play.join("worker", "new", "w0")
    assert play.tell(Joined(JOB, "worker", "w0", "agent-0", former=1)) == [
        Refuse(JOB, "agent-0", "w0#1 is over: another process is w0#2")
    ]
    assert play.machine.is_current(JOB, "w0", 2)


# -- ending ----------------------------------------------------------------------------------------------


def test_a_job_has_succeeded_when_all_workers_have_finished_and_the_shards_have_stopped() -> None:
    play = running(2, 2)
    play.tell(finished(W0))
    because = "all 2 workers finished"
    assert play.tell(finished(W1)) == [
        Stop(JOB, W1, "its script finished"),
        Stop(JOB, P0, because),
        Stop(JOB, P1, because),
    ]
    assert play.state() == "FINISHING"
    assert play.tell(Left(JOB, "p1", 1, "")) == []
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.SUCCEEDED, 0, because)]
    assert play.machine.exit_code(JOB) == 0


def test_a_job_succeeds_in_spite_of_a_lost_worker_and_says_so() -> None:
    play = running(2, 1)
    play.tell(killed(W0))
    play.tell(finished(W1))
    because = "1 of 2 workers finished; w0 was lost: its script was killed by SIGKILL"
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.SUCCEEDED, 0, because)]


def test_the_first_script_that_fails_ends_the_job_with_its_exit_code() -> None:
    play = running(2, 1)
    because = "w1 failed: its script raised ValueError: boom (train.py:12)"
    assert play.tell(failed(W1, code=3)) == [
        Stop(JOB, W1, "its script raised ValueError: boom (train.py:12)"),
        Stop(JOB, W0, because),
        Stop(JOB, P0, because),
    ]
    assert play.tell(failed(W0, code=7)) == [], "stopped because of w1"
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.FAILED, 3, because)]


def test_when_all_workers_are_lost_the_job_has_failed() -> None:
    play = running(2, 1)
    play.fall_silent("w0", "w1")
    play.wait(59.0)
    assert play.state() == "RUNNING", "until a minute after the last of them was lost"
    give_up(play)
    play.tell(Left(JOB, "p0", 1, ""))
    assert (play.state(), play.machine.exit_code(JOB)) == ("FAILED", 4)
    lost = "was lost: silent for 1.0 s"
    assert play.machine.because(JOB) == f"0 of 2 workers finished; w0 {lost}; w1 {lost}"


def test_when_the_only_script_was_killed_the_job_ends_as_a_shell_would() -> None:
    play = running(1, 1)
    play.tell(killed(W0))
    play.tell(Left(JOB, "p0", 1, ""))
    assert (play.state(), play.machine.exit_code(JOB)) == ("FAILED", 128 + 9)


def test_a_lost_shard_is_waited_for_and_serves_its_chunks_again_when_it_has_them() -> None:
    play = running(1, 2)
    play.register("w0", digest="d")
    because = "p1 was lost: silent for 1.0 s; nobody else has its chunks"
    fence, wait = play.fall_silent("p1")
    assert fence == Fence(JOB, P1, 1, "silent for 1.0 s")
    assert isinstance(wait, Await) and (wait.shard, wait.because) == (P1, because)
    assert play.machine.waiting_for(JOB) == "waiting for shard p1 to come back"
    admit, wait = play.join("shard", "again", "p1")
    assert isinstance(admit, Admit) and (admit.member, admit.incarnation) == (P1, 2)
    assert isinstance(wait, Await), "it has not read its log yet"
    play.wait(30)
    assert play.tell(Returned(JOB, "p1", 2, "d")) == [Rehome(JOB, P1, 2, "p1 is back")]
    assert play.tell(Returned(JOB, "p1", 2, "d")) == [], "twice is the same as once"
    assert play.machine.next_deadline() is not None
    play.wait(100)
    assert play.state() == "RUNNING"


@pytest.mark.parametrize(("holds", "held"), [("", "nothing"), ("e", "other chunks")])
def test_a_shard_that_comes_back_without_its_chunks_is_turned_away_and_the_job_waits_on(
    holds: str, held: str
) -> None:
    play = running(1, 1)
    play.register("w0", digest="d")
    play.fall_silent("p0")
    play.join("shard", "empty", "p0")
    stop, wait = play.tell(Returned(JOB, "p0", 2, holds))
    because = f"p0 was started again with {held} in its log, and cannot take the place of the former"
    assert stop == Stop(JOB, P0, because)
    assert isinstance(wait, Await) and wait.because == because
    play.join("shard", "whole", "p0")
    assert play.tell(Returned(JOB, "p0", 3, "d")) == [Rehome(JOB, P0, 3, "p0 is back")]


def test_before_any_script_has_shown_its_model_a_shard_may_come_back_with_nothing() -> None:
    play = running(1, 1)
    play.fall_silent("p0")
    play.join("shard", "again", "p0")
    assert play.tell(Returned(JOB, "p0", 2, "")) == [Rehome(JOB, P0, 2, "p0 is back")]


def test_a_shard_that_does_not_come_back_ends_the_job() -> None:
    play = running(1, 1)
    play.fall_silent("p0")
    because = (
        "p0 was lost: silent for 1.0 s; it did not come back within 60 s, and nobody else has its chunks"
    )
    play.now += 58
    play.hear("w0")
    play.now += 0.9
    play.hear("w0")
    play.now += 0.9
    assert play.hear("w0") == [Stop(JOB, W0, because)]
    assert play.tell(Left(JOB, "w0", 1, "")) == [Finish(JOB, State.FAILED, 4, because)]


@pytest.mark.parametrize("drained", [False, True])
def test_a_shard_whose_process_died_is_let_in_again_at_once(drained: bool) -> None:
    play = running(1, 2)
    play.register("w0", digest="d")
    if drained:
        play.tell(DrainAsked(JOB, "Ctrl-C"))
    fence, wait = play.tell(died("p1"))
    assert fence == Fence(JOB, P1, 1, KILLED)
    because = f"p1 was lost: {KILLED}; nobody else has its chunks"
    assert isinstance(wait, Await) and (wait.shard, wait.because) == (P1, because)
    admit, _ = play.join("shard", "again", "p1")
    assert isinstance(admit, Admit) and (admit.member, admit.incarnation) == (P1, 2)
    assert play.tell(died("p1")) == [Ignored(JOB, "p1#1 is over: p1#2 took its place")]
    assert play.tell(Returned(JOB, "p1", 2, "d")) == [Rehome(JOB, P1, 2, "p1 is back")]


def test_a_job_that_is_drained_waits_for_a_lost_shard_too() -> None:
    play = running(1, 1)
    play.register("w0", digest="d")
    play.tell(DrainAsked(JOB, "Ctrl-C"))
    play.fall_silent("p0")
    play.join("shard", "again", "p0")
    assert play.tell(Returned(JOB, "p0", 2, "d")) == [Rehome(JOB, P0, 2, "p0 is back")]


def test_a_drained_job_ends_when_its_workers_have_left_and_is_safe_to_run_again() -> None:
    play = running(2, 1)
    assert play.tell(DrainAsked(JOB, "Ctrl-C")) == [Drain(JOB, "Ctrl-C")]
    assert play.tell(DrainAsked(JOB, "Ctrl-C")) == [
        Ignored(JOB, "DrainAsked means nothing to a job that is DRAINING")
    ]
    play.tell(finished(W0))
    play.tell(Left(JOB, "w1", 1, "Ctrl-C"))
    assert play.tell(Left(JOB, "p0", 1, "")) == [
        Finish(JOB, State.CANCELLED, 75, "Ctrl-C: all 2 workers stopped in order")
    ]


def test_a_job_that_loses_all_workers_while_it_is_drained_has_failed() -> None:
    play = running(1, 1)
    play.tell(DrainAsked(JOB, "Ctrl-C"))
    play.tell(killed(W0))
    play.tell(Left(JOB, "p0", 1, ""))
    assert play.state() == "FAILED"


@pytest.mark.parametrize("event", [DrainAsked(JOB, "Ctrl-C"), Cancelled(JOB, "Ctrl-C")])
def test_a_job_that_has_not_begun_ends_at_once(event: Event) -> None:
    play = Play(2, 1)
    assert play.tell(event) == [Finish(JOB, State.CANCELLED, 130, "Ctrl-C")]


def test_a_cancelled_job_stops_everybody() -> None:
    play = running(1, 1)
    assert play.tell(Cancelled(JOB, "Ctrl-C")) == [Stop(JOB, W0, "Ctrl-C"), Stop(JOB, P0, "Ctrl-C")]
    play.tell(Left(JOB, "w0", 1, ""))
    assert play.tell(Left(JOB, "p0", 1, "")) == [Finish(JOB, State.CANCELLED, 130, "Ctrl-C")]


def test_who_asks_once_more_does_not_wait_for_those_who_do_not_stop() -> None:
    play = running(1, 1)
    play.tell(Cancelled(JOB, "Ctrl-C"))
    assert play.tell(Cancelled(JOB, "Ctrl-C again")) == [Finish(JOB, State.CANCELLED, 130, "Ctrl-C")]
    assert [view.because for view in play.machine.members(JOB)] == ["Ctrl-C again", "Ctrl-C again"]


def test_members_that_just_end_when_told_to_stop_are_not_waited_for_longer_than_their_leases() -> None:
    play = running(1, 1)
    play.tell(finished(W0))
    assert play.fall_silent("p0") == [Finish(JOB, State.SUCCEEDED, 0, "the worker finished")]


def test_all_who_fall_silent_at_once_are_lost_at_once_and_waited_for() -> None:
    play = running(2, 2)
    actions = play.fall_silent("w0", "w1", "p0", "p1")
    assert {action.member for action in actions if isinstance(action, Fence)} == {W0, W1, P0, P1}
    assert play.machine.waiting_for(JOB) == "waiting for shards p0 and p1 to come back"
    play.now += 61
    assert isinstance(play.tell(Ticked(JOB))[-1], Finish) and play.state() == "FAILED"


def test_members_that_do_not_stop_are_not_waited_for_for_ever() -> None:
    play = running(1, 1)
    play.tell(finished(W0))
    assert play.wait(9.5) == []
    play.now += 0.5
    assert play.tell(Ticked(JOB)) == [Finish(JOB, State.SUCCEEDED, 0, "the worker finished")]
    assert play.machine.members(JOB)[1].because == "it did not stop within 10 s"


def test_a_job_that_is_over_ignores_everything() -> None:
    play = Play(1, 1)
    play.tell(Cancelled(JOB, "Ctrl-C"))
    assert play.tell(Renewed(JOB, "w0", 1)) == [Ignored(JOB, "job j is over (CANCELLED: Ctrl-C)")]
    assert play.tell(Ticked(JOB)) == []


# -- many jobs -------------------------------------------------------------------------------------------


def test_jobs_do_not_see_each_other() -> None:
    machine = Machine(Rules())
    first, second = JobId("a"), JobId("b")
    for job in (first, second):
        machine.handle(Submitted(job, 1, 1, 0), 0.0)
        machine.handle(Joined(job, "shard", "", f"shard of {job}"), 0.0)
        machine.handle(Joined(job, "worker", "", f"agent of {job}"), 0.0)
    machine.handle(Exited(first, "w0", 1, 1, 0, "its script failed"), 0.5)
    assert (machine.state(first), machine.state(second)) == (State.FINISHING, State.RUNNING)
    assert machine.is_current(second, "w0", 1) and not machine.is_current(first, "w0", 1)
    machine.check()


def test_of_the_jobs_that_are_over_the_latest_are_remembered() -> None:
    machine = Machine(Rules(remembered_jobs=2))
    for name in ("a", "b", "c"):
        machine.handle(Submitted(JobId(name), 1, 1, 0), 0.0)
        machine.handle(Cancelled(JobId(name), "enough"), 0.0)
        machine.check()
    assert list(machine.over) == ["b", "c"]
    assert machine.handle(Ticked(JobId("a")), 1.0) == []
    with pytest.raises(KeyError):
        machine.state(JobId("a"))


# -- whatever happens ------------------------------------------------------------------------------------


class World(RuleBasedStateMachine):
    """Two jobs, processes that come and go, members and strangers that say all kinds of things, in any order.

    Everything the machine orders is audited against what the orders before it allow.
    """

    @initialize(workers=st.integers(1, 3), shards=st.integers(1, 2))
    def begin(self, workers: int, shards: int) -> None:
        self.machine = Machine(Rules(goodbye_s=4.0))
        self.now = 0.0
        self.jobs = [JobId("a"), JobId("b")]
        self.peers = 0
        self.generation: Counter[JobId] = Counter()
        self.admitted: dict[tuple[JobId, str], int] = {}  # the newest incarnation of each id
        self.fenced: set[tuple[JobId, str, int]] = set()
        self.seats: dict[JobId, tuple[Seat, ...]] = {}
        self.over: set[JobId] = set()
        for job in self.jobs:
            self.tell(Submitted(job, workers, shards, 0))
        for number in range(shards):  # the first job runs, the second is left to chance
            self.tell(Joined(self.jobs[0], "shard", "", f"founding shard {number}"))
        for number in range(workers):
            self.tell(Joined(self.jobs[0], "worker", "", f"founding worker {number}"))

    def snapshot(self) -> str:
        jobs = [(repr(job), repr(job.members.records)) for job in self.machine.jobs.values()]
        jobs = [(re.sub(r"<.*?Members object at 0x\w+>", "", text), records) for text, records in jobs]
        return repr((jobs, self.machine.over, self.machine.goodbyes, self.machine.returns))

    def tell(self, event: Event) -> list[Action]:
        deadline = self.machine.next_deadline()
        time_is_up = deadline is not None and deadline <= self.now
        before = self.snapshot()
        actions = self.machine.handle(event, self.now)
        if actions and all(isinstance(action, Ignored | Refuse) for action in actions) and not time_is_up:
            refused_layout = isinstance(event, Registered) and isinstance(actions[0], Refuse)
            assert refused_layout or self.snapshot() == before, "it said no, and something changed"
        for action in actions:
            self.audit(action)
        answers = [action for action in actions if isinstance(action, Admit | Refuse)]
        if isinstance(event, Joined):
            assert [answer.peer for answer in answers] == [event.peer], "a join has one answer"
        else:
            assert not [answer for answer in answers if isinstance(answer, Admit)]
        deadline = self.machine.next_deadline()
        assert deadline is None or deadline > self.now
        return actions

    def audit(self, action: Action) -> None:
        job = action.job
        assert action.because, f"no reason: {action}"
        assert job not in self.over or isinstance(action, Ignored | Refuse), f"after the end: {action}"
        match action:
            case Admit():
                newest = self.admitted.get((job, action.member), 0)
                again = action.because.endswith("already")
                assert action.incarnation == newest + (not again)
                assert action.generation in (self.generation[job], self.generation[job] + 1)
                self.admitted[job, action.member] = action.incarnation
            case Fence():
                fence = (job, action.member, action.incarnation)
                assert self.admitted[job, action.member] == action.incarnation and fence not in self.fenced
                self.fenced.add(fence)
            case Announce():
                self.generation[job] += 1
                assert action.generation == self.generation[job], "a generation was left out"
                assert action.seats or not self.machine.workers(job), "somebody is left, and not announced"
                for seat in action.seats:
                    assert self.admitted[job, seat.worker] == seat.incarnation
                    assert (job, seat.worker, seat.incarnation) not in self.fenced
                self.seats[job] = action.seats
            case Launch():
                assert self.admitted[job, action.worker] == action.incarnation
                assert (job, action.worker, action.incarnation) not in self.fenced
            case Initialise():
                assert action.worker == self.seats[job][0].worker
            case Rehome():
                assert self.admitted[job, action.shard] == action.incarnation
                assert (job, action.shard, action.incarnation) not in self.fenced
            case Drain():
                assert self.seats[job], "there is nobody to drain"
            case Stop():
                assert (job, action.member) in self.admitted
            case Finish():
                self.over.add(job)

    @rule(
        job=st.integers(0, 1),
        shard=st.booleans(),
        wish=st.integers(-3, 3),
        peer=st.integers(0, 12),
        former=st.sampled_from([0, 0, 0, 1, 2]),
    )
    def joins(self, job: int, shard: bool, wish: int, peer: int, former: int) -> None:
        member = f"{'p' if shard else 'w'}{wish}" if wish >= 0 else ""
        role: Role = "shard" if shard else "worker"
        self.tell(Joined(self.jobs[job], role, member, f"process {peer} of {job}", former))

    @rule(
        job=st.integers(0, 1),
        kind=st.sampled_from([Registered, Loaded, Returned, Exited, Exited, Left, Died]),
        choice=st.integers(0, 6),
        stale=st.sampled_from([0] * 8 + [1, -1]),
        values=st.fixed_dictionaries(
            {
                "digest": st.sampled_from("ddddddde"),
                "holds": st.sampled_from(["d", "d", "d", ""]),
                "chunks": st.sampled_from([3] * 9 + [0]),
                "code": st.sampled_from([0] * 8 + [1]),
                "signal": st.sampled_from([0] * 8 + [9]),
                "because": st.just("it said so"),
                "returns": st.booleans(),
            }
        ),
    )
    def says(self, job: int, kind: Any, choice: int, stale: int, values: dict[str, Any]) -> None:
        known = [member for where, member in self.admitted if where == self.jobs[job]]
        member = [*known, "nobody", ""][choice % (len(known) + 2)]
        incarnation = self.admitted.get((self.jobs[job], member), 1) + stale
        wanted = {field.name for field in fields(kind)} & values.keys()
        self.tell(
            kind(self.jobs[job], member, incarnation, **{name: values[name] for name in sorted(wanted)})
        )

    @rule(job=st.integers(0, 1), how=st.sampled_from([None] * 5 + [Cancelled, DrainAsked]))
    def is_asked_to_end(self, job: int, how: Any) -> None:
        if how is not None:
            self.tell(how(self.jobs[job], "Ctrl-C"))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.4, 0.9]), deaf=st.integers(0, 9))
    def time_passes_and_all_but_one_are_heard(self, seconds: float, deaf: int) -> None:
        self.now += seconds
        for number, ((job, member), incarnation) in enumerate(self.admitted.items()):
            if number != deaf:
                self.tell(Renewed(job, member, incarnation))

    @rule(seconds=st.sampled_from([0.1, 0.1, 0.4, 3.0]))
    def time_passes_in_silence(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Ticked(self.jobs[0]))

    @invariant()
    def everything_holds(self) -> None:
        self.machine.check()

    def teardown(self) -> None:
        """If everybody falls silent, nothing goes on for ever."""
        for _ in range(100):
            deadline = self.machine.next_deadline()
            if deadline is None:
                break
            self.now = deadline
            self.tell(Ticked(self.jobs[0]))
            self.machine.check()
        assert self.machine.next_deadline() is None
        for job in self.jobs:
            assert job in self.over or self.machine.state(job) is State.FORMING


World.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestWorld = World.TestCase


@pytest.mark.parametrize("lost", ["p0", "w0"])
def test_a_journal_is_read_as_it_was_lived_also_by_who_has_more_patience(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only shard, or the only worker, did not come back in time."""
    told: list[tuple[Event, float]] = []
    tell = Machine.tell

    def write(self: Machine, event: Event, now: float) -> list[Action]:
        told.append((event, now))
        return tell(self, event, now)

    monkeypatch.setattr(Machine, "tell", write)
    play = running(1, 1, Rules(return_s=3.0))
    play.tell(died(lost))
    for _ in range(8):
        play.now += 0.5
        play.hear(*play.alive())
        play.tell(Ticked(JOB))
    assert any(isinstance(event, TimeUp) for event, _ in told)
    assert play.state() == "FINISHING"
    monkeypatch.undo()
    twin = Machine(Rules(return_s=600.0))
    for event, now in told:
        twin.tell(event, now)
    assert twin.state(JOB).name == play.state()
    assert len(twin.members(JOB)) == len(play.machine.members(JOB))
