"""The sentences that people read."""

from tests.scheduler.play import JOB, Play, running
from zml.scheduler.events import Cancelled, DrainAsked, Exited, Loaded
from zml.scheduler.explain import MemberView, counted, listed, name_samples
from zml.scheduler.ids import ShardId, WorkerId


def test_numbers_and_lists_read_as_english() -> None:
    assert (counted(1, "worker"), counted(4, "worker")) == ("1 worker", "4 workers")
    assert listed([]) == "" and listed(["w0"]) == "w0" and listed(["w0", "w1", "p0"]) == "w0, w1 and p0"
    assert listed([f"w{n}" for n in range(20)]) == "w0, w1, w2, w3, w4, w5, w6 and 13 more"


def test_a_forming_job_says_whom_it_waits_for() -> None:
    play = Play(4, 3)
    assert play.machine.waiting_for(JOB) == "waiting for 4 of 4 workers and shards p0, p1 and p2"
    for peer in ("a", "b", "c"):
        play.join("worker", peer)
    play.join("shard", "d", "p1")
    play.join("shard", "e", "p0")
    assert play.machine.waiting_for(JOB) == "waiting for 1 of 4 workers and shard p2"
    assert play.machine.because(JOB) == play.machine.waiting_for(JOB)


def test_each_stage_of_a_life_has_its_sentence() -> None:
    play = running(2, 1)
    says = play.machine.waiting_for
    assert says(JOB) == "waiting for the first script to show its model"
    play.register("w1")
    assert says(JOB) == "waiting for w0 to bring the first parameters"
    play.tell(Loaded(JOB, "w0", 1))
    assert says(JOB) == "" and play.machine.because(JOB) == ""
    play.tell(DrainAsked(JOB, "Ctrl-C"))
    assert says(JOB) == "waiting for w0 and w1 to finish the step, save and leave"
    play.tell(Cancelled(JOB, "Ctrl-C again"))
    assert says(JOB) == "waiting for w0, w1 and p0 to stop" and play.machine.because(JOB) == "Ctrl-C again"
    play.tell(Cancelled(JOB, "Ctrl-C again"))
    assert says(JOB) == "" and play.machine.because(JOB) == "Ctrl-C again"


def test_members_are_told_of_with_how_they_ended() -> None:
    play = Play(2, 1)
    play.join("worker", "a")
    assert play.machine.members(JOB) == [MemberView(WorkerId("w0"), "worker", 1, "joined", "")]
    play.join("shard", "b")
    play.join("worker", "c")
    play.tell(Exited(JOB, "w0", 1, 0, 0, "its script finished"))
    play.fall_silent("w1")
    assert play.machine.members(JOB) == [
        MemberView(WorkerId("w0"), "worker", 1, "done", "its script finished"),
        MemberView(WorkerId("w1"), "worker", 1, "lost", "silent for 1.0 s"),
        MemberView(ShardId("p0"), "shard", 1, "active", ""),
    ]
    assert play.machine.because(JOB) == "1 of 2 workers finished; w1 was lost: silent for 1.0 s"


def test_a_crowd_that_was_lost_is_not_told_of_by_name() -> None:
    play = running(12, 1)
    for number in range(11):
        play.tell(Exited(JOB, f"w{number}", 1, 0, 9, "its script was killed by SIGKILL"))
    play.tell(Exited(JOB, "w11", 1, 0, 0, "its script finished"))
    because = play.machine.because(JOB)
    assert because.startswith("1 of 12 workers finished; w0 was lost: its script was killed by SIGKILL; w1 ")
    assert because.endswith("; 4 more did not")


def test_one_worker_that_finished_is_told_of_as_one() -> None:
    play = running(1, 1)
    play.tell(Exited(JOB, "w0", 1, 0, 0, "its script finished"))
    assert play.machine.because(JOB) == "the worker finished"


def test_workers_of_a_job_that_was_drained_have_stopped_and_not_finished() -> None:
    play = running(2, 1)
    play.tell(DrainAsked(JOB, "SIGINT at zml run"))
    play.tell(Exited(JOB, "w0", 1, 0, 0, "its script finished"))
    play.tell(Exited(JOB, "w1", 1, 0, 9, "its script was killed by SIGKILL"))
    because = (
        "SIGINT at zml run: 1 of 2 workers stopped in order; w1 was lost: its script was killed by SIGKILL"
    )
    assert play.machine.because(JOB) == because
    play = running(1, 1)
    play.tell(DrainAsked(JOB, "SIGINT at zml run"))
    play.tell(Exited(JOB, "w0", 1, 0, 0, "its script finished"))
    assert play.machine.because(JOB) == "SIGINT at zml run: the worker stopped in order"


def test_samples_are_named_as_far_as_a_sentence_can_hold_them() -> None:
    assert name_samples([]) == "its samples are not known"
    assert name_samples([7]) == "sample 7"
    assert name_samples(range(22)).endswith("18, 19 and 2 more")
