"""What a shard counts of itself: what came, what of it counted, and what left."""

from pathlib import Path

import pytest

from tests.simulation import simulate
from tests.zml.test_shard import JOB, Bench
from zml.coordinator.board import Board
from zml.figures import APPLY_BOUNDS_S, ShardFigures, none_yet
from zml.messages import Gauge, JobSpec, Pull, Push
from zml.scheduler.ids import JobId
from zml.shard.counts import figures
from zml.shard.pushlog import PushLog
from zml.shard.shard import Shard
from zml.transport import Refusal

PARAMETERS = 4 * 18  # bytes of 5 * 3 + 3 in fp32


def told(bench: Bench) -> ShardFigures:
    return figures(bench.shard, 1 << 20)


def test_a_shard_without_a_layout_counts_nothing_and_says_so() -> None:
    shard = Shard(JobId(JOB), "p0")
    assert figures(shard, 7) == ShardFigures(memory_bytes=7, apply_s=none_yet(APPLY_BOUNDS_S))


def test_pushes_commits_and_pulls_are_counted_by_what_becomes_of_them() -> None:
    async def main() -> tuple[int, list[ShardFigures]]:
        bench, looks = Bench(0), []
        looks.append(told(bench))
        bench.load()
        assert bench.push("w0", 0) and len(bench.gradient(1.0)) > PARAMETERS
        looks.append(told(bench))  # staged
        bench.commit("w0", 0)
        waiting = bench.ask("w0", Pull(JOB, "w0", 1, 1, 0, [0]))
        looks.append(told(bench))  # committed, and waits for w1
        bench.step("w1", 0)
        await waiting
        bench.push("w0", 0)
        bench.commit("w0", 0)
        for wrong in (Push(JOB, "w9", 1, 1, 0), Push(JOB, "w0", 1, 7, 0), Push(JOB, "w0", 1, 1, 0)):
            with pytest.raises(Refusal):
                bench.ask(wrong.worker, wrong, b"\xff" * 9)
        looks.append(told(bench))
        return len(bench.gradient(1.0)), looks

    size, (empty, staged, waits, after) = simulate(main())
    assert (empty.chunks, empty.version, empty.parameter_bytes) == (1, 0, PARAMETERS)
    assert (staged.pushes, staged.staged, staged.received_bytes) == (1, 1, size)
    assert (waits.pushes, waits.staged, waits.parked, waits.updates) == (2, 1, 1, 0)
    assert (after.pushes, after.duplicates, after.refused) == (4, 2, 3)
    assert (after.updates, after.version, after.staged, after.parked) == (1, 1, 0, 0)
    assert (after.received_bytes, after.dense_received_bytes) == (2 * size, 2 * PARAMETERS)
    assert (after.pulls, after.dense_sent_bytes) == (1, PARAMETERS) and after.sent_bytes > PARAMETERS
    assert sum(after.apply_s) == 1 and after.apply_sum_s > 0 and after.memory_bytes == 1 << 20


def test_a_pull_that_brings_nothing_new_has_sent_nothing() -> None:
    bench = Bench(None, workers=1)
    bench.load()
    bench.ask("w0", Pull(JOB, "w0", 1, 0, 0, [0]))
    assert (told(bench).pulls, told(bench).sent_bytes, told(bench).dense_sent_bytes) == (1, 0, 0)


def test_what_a_former_life_took_is_not_counted_again(tmp_path: Path) -> None:
    bench = Bench(0, workers=1)
    log = bench.shard.log = PushLog(tmp_path)
    bench.load()
    for clock in range(3):
        bench.step("w0", clock)
    before = told(bench)
    assert before.log_bytes == log.bytes > 0
    again = Bench(0, workers=1)
    for message, payload in log.replay():
        again.shard.replay(message, payload)
    after = told(again)
    assert (after.updates, after.version) == (before.updates, before.version) == (3, 3)
    assert (after.pushes, after.received_bytes, sum(after.apply_s)) == (0, 0, 0)
    log.close()
    again.push("w0", 3)
    assert told(again).pushes == 1, "from now on"


def test_a_shard_to_which_nothing_happens_is_no_news() -> None:
    board, bench = Board(JobSpec(), []), Bench(0)

    def tell() -> int:
        gauge = bench.shard.pace.gauge(JOB, "p0", 1, bench.shard.steps, told(bench))
        board.gauge(gauge, lambda what, because: None)
        return board.changes

    assert [tell(), tell(), tell()] == [1, 1, 1]
    bench.load()
    bench.push("w0", 0)
    assert [tell(), tell()] == [2, 2]
    assert board.gauges["p0"].figures == told(bench), "also before the first update"


def test_what_a_shard_with_updates_says_of_the_rate_counts_whoever_comes_before_it() -> None:
    board, notes = Board(JobSpec(lr_scaling="sqrt"), []), []
    for shard, updates in (("p0", 0), ("p1", 5)):  # p0 holds no chunks
        gauge = Gauge(
            job=JOB, member=shard, incarnation=1, shard=shard, updates=updates, change=(2.0, "four workers")
        )
        board.gauge(gauge, lambda what, because: notes.append(what))
    assert notes == ["learning rate x 2"]
