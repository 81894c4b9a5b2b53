"""The board: what members count adds up over all their lives, and a job that hangs has no speed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.play import JOB, running
from tests.zml.watched import of_shard, of_worker
from zml.coordinator.board import RATE_S, Board, Card
from zml.figures import Lives, ShardFigures, WorkerFigures, after
from zml.messages import Gauge, JobSpec, Join, Joined, Report
from zml.scheduler.batches import Ledger


def entered(board: Board, incarnation: int) -> None:
    join = Join(job="job", member="w0", role="worker", node="here", pid=incarnation)
    joined = Joined(
        job="job",
        member="w0",
        incarnation=incarnation,
        generation=1,
        heartbeat_s=1.0,
        lease_s=5.0,
        run_dir="",
    )
    board.joined(join, joined, 0.0)


def report(board: Board, now: float, steps: int, **more: object) -> None:
    said = Report(job="job", worker="w0", incarnation=1, steps=steps, epoch=0, samples=64 * steps)
    board.report(msgspec.structs.replace(said, **more), now)


def gauge(board: Board, incarnation: int, figures: ShardFigures | None, member: str = "p0") -> None:
    said = Gauge(job="job", member=member, incarnation=incarnation, shard="p0", updates=1, figures=figures)
    board.gauge(said, lambda what, because: None)


def shown(board: Board) -> ShardFigures | None:
    board.cards.setdefault("p0", Card("shard", "here", "", 1, 0.0))
    return board.member("p0", "active", "", 0.0).shard


def test_a_worker_that_is_started_again_goes_on_counting() -> None:
    board = Board(JobSpec(), [])
    first, second = (of_worker(steps, {"compute": 0.06}, 0.2, memory_bytes=steps) for steps in (10, 3))
    entered(board, 1)
    report(board, 1.0, 10, figures=first)
    entered(board, 1)  # its answer was lost: the same process
    report(board, 1.5, 10, figures=first)
    assert board.cards["w0"].figures == first
    for incarnation, had in ((2, [first]), (3, [first, second])):
        entered(board, incarnation)
        former = board.cards["w0"].figures
        assert former is not None and former.steps == sum(each.steps for each in had)
        assert (former.memory_bytes, former.learning_rate) == (0, None), "nobody says anything of now"
        report(board, 2.0, 3, figures=second)
        report(board, 2.5, 3, figures=second)
        report(board, 3.0, 3)
        expected = had[0]
        for each in (*had[1:], second):
            expected = after(expected, each)
        assert board.cards["w0"].figures == expected
    card = board.cards["w0"]
    assert card.figures is not None and (card.figures.steps, card.figures.memory_bytes) == (16, 3)
    assert card.figures.samples == card.samples == 16 * 64


def test_a_shard_that_is_started_again_goes_on_counting_and_holds_what_it_holds_now() -> None:
    board = Board(JobSpec(), [])
    gauge(board, 1, of_shard(5))
    assert shown(board) == of_shard(5)
    again = msgspec.structs.replace(of_shard(2), updates=7, version=7, chunks=4, parked=0)
    gauge(board, 2, None)
    assert shown(board) == of_shard(5), "nothing is told yet"
    gauge(board, 2, again)
    found = shown(board)
    both = of_shard(7)
    assert found == msgspec.structs.replace(
        both, chunks=4, parked=0, apply_sum_s=pytest.approx(both.apply_sum_s)
    )


def test_a_last_word_that_comes_late_counts_once() -> None:
    board = Board(JobSpec(), [])
    for member, updates in (("p0", 5), ("p1", 1), ("p0", 6), ("p1", 2), ("p0", 6), ("p1", 3)):
        gauge(board, 1, of_shard(updates), member)
    found = shown(board)
    assert found is not None and found.pushes == of_shard(9).pushes
    gauge(board, 1, of_shard(1), "p0")  # it has moved back, and counts from 0
    found = shown(board)
    assert found is not None and found.pushes == of_shard(10).pushes


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=9))
def test_what_a_shard_has_counted_never_falls_and_is_the_sum_of_its_lives(lives: list[list[int]]) -> None:
    known, last = Lives(), 0
    for number, more in enumerate(lives):
        pushes = 0
        for each in more:
            pushes += each
            known.told(("p0", number), ShardFigures(pushes=pushes))
            assert known.together.pushes >= last
            last = known.together.pushes
    assert last == sum(map(sum, lives))


def test_a_job_that_hangs_has_no_speed() -> None:
    board = Board(JobSpec(), [])
    entered(board, 1)
    for second in range(5):
        report(board, float(second), second)
    assert board.samples_per_s(4.0) == 64.0
    assert board.samples_per_s(RATE_S + 2.0) == 64.0, "of what is left"
    assert board.samples_per_s(RATE_S + 4.0) == 0.0
    assert board.samples_per_s(2 * RATE_S + 5.0) == 0.0
    report(board, 100.0, 4)
    report(board, 102.0, 5)
    assert board.samples_per_s(102.0) == 32.0


def test_figures_of_scripts_that_say_nothing_are_none() -> None:
    assert after(WorkerFigures(), WorkerFigures()) == WorkerFigures()


def test_a_shard_without_room_is_told_of_once_and_waited_for_while_it_lives() -> None:
    play = running(workers=1, shards=1)
    board = Board(JobSpec(), [])
    for member, role in (("w0", "worker"), ("p0", "shard")):
        board.cards[member] = Card(role, "here", "", 1, 0.0)
    told: list[str] = []

    def says(no_room: str) -> list[str]:
        figures = msgspec.structs.replace(of_shard(5), no_room=no_room)
        said = Gauge(job="job", member="p0", incarnation=1, shard="p0", updates=1, figures=figures)
        board.gauge(said, lambda what, because: told.append(f"{what}: {because}" if because else what))
        first, *others = board.status(play.machine.jobs[JOB], Ledger(), 0.0).waiting_for
        assert first == "waiting for the first script to show its model"
        return others

    because = "p0 has no room for its push log in /small"
    assert says("") == []
    assert says(because) == says(because) == [f"waiting for room: {because}"]
    assert board.stalls == 2, "each word keeps those who wait patient"
    assert says("") == []
    assert told == [f"{because}: training waits until there is some", "p0 has room again"]
