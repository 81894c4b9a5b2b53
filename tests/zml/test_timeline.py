"""Where the time of a worker goes: nothing is counted twice, and nothing is lost."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.figures import BESIDE, PHASES
from zml.runs.timeline import Step, read
from zml.text.bars import phases
from zml.text.waterfall import table
from zml.worker.timeline import Phases, Timeline


class Clock:
    """`perf_counter`, which moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def a_step(timeline: Timeline, clock: Clock, number: int) -> None:
    """1 s data, of which it waits 0.25 s for others; 2 s computing, in which it packs for 0.5 s; 4 s waiting; 8 s
    applying."""

    def items() -> Iterator[int]:
        clock.pass_(0.5)
        with timeline.measure("wait"):
            clock.pass_(0.25)
        clock.pass_(0.25)
        yield number

    assert list(timeline.reading(items())) == [number]
    clock.pass_(1.0)
    with timeline.measure("encode"):
        clock.pass_(0.5)
        timeline.sent(100, 400)
    clock.pass_(0.5)
    timeline.open()
    with timeline.measure("wait"):
        clock.pass_(4.0)
    with timeline.measure("apply"):
        clock.pass_(8.0)
        timeline.came(10, 400)


def test_a_step_is_its_phases_and_what_is_nested_counts_once(clock: Clock, tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "w0.jsonl")
    assert timeline.phases == {}, "nobody knows when the first step began"
    a_step(timeline, clock, 0)
    assert timeline.close(0) is None
    for number in range(1, 4):
        a_step(timeline, clock, number)
        assert timeline.close(number) == 0.75 + 1.5, "what a step would take with nobody else"
        exchange = timeline.exchange
        exchange.send_s, exchange.pull_s = 0.5, 0.25
        timeline.ended(exchange)
    timeline.write()
    steps = [msgspec.structs.replace(step, began=0.0) for step in read(timeline.path or tmp_path)]
    assert steps == [
        Step(1, 0.0, 1.5, 0.5, 4.25, 8.0, 0.5, 0.25, bytes_up=100, bytes_down=10, data=0.75),
        Step(2, 15.0, 1.5, 0.5, 4.25, 8.0, 0.5, 0.25, bytes_up=100, bytes_down=10, data=0.75),
    ], "the last one's exchange may be under way"
    assert {step.whole for step in steps} == {15.0}
    assert timeline.phases == {
        "data": 3 * 0.75,
        "compute": 3 * 1.5,
        "encode": 3 * 0.5,
        "wait": 3 * 4.25,
        "apply": 3 * 8.0,
        "push": 3 * 0.5,
        "pull": 3 * 0.25,
    }
    assert (timeline.up, timeline.down, timeline.dense_up, timeline.dense_down) == (400, 40, 1600, 1600)


def test_what_belongs_to_no_step_belongs_to_the_thread_all_the_same(clock: Clock) -> None:
    timeline = Timeline()
    timeline.close(0)
    with timeline.measure("wait"):
        clock.pass_(3.0)
    clock.pass_(2.0)  # an evaluation
    timeline.pause()
    clock.pass_(1.0)
    assert timeline.close(1) == 1.0
    assert sum(timeline.phases[phase] for phase in PHASES) == 6.0
    assert timeline.phases["compute"] == 3.0


def test_a_pause_inside_of_the_loader_begins_the_step_there(clock: Clock, tmp_path: Path) -> None:
    """An epoch begins in the loader: the order is drawn once all workers are there, and workers are started."""
    timeline = Timeline(tmp_path / "w0.jsonl")

    def items() -> Iterator[int]:
        clock.pass_(5.0)
        timeline.pause()
        clock.pass_(1.0)
        yield 1

    timeline.close(0)
    list(timeline.reading(items()))
    clock.pass_(2.0)
    timeline.close(1)
    timeline.open()
    timeline.close(2)
    timeline.write()
    (step,) = read(tmp_path / "w0.jsonl")
    assert (step.data, step.compute, step.at) == (1.0, 2.0, 5.0)
    assert timeline.phases["data"] == 6.0


@given(st.integers(0, 2**32))
def test_phases_add_up_to_the_time_between_the_first_step_and_the_newest(seed: int) -> None:
    """Whatever the thread does, and however deep, in the real clock's own numbers."""
    dice = random.Random(seed)
    timeline, ends = Timeline(), []

    def do(depth: int) -> None:
        for _ in range(dice.randrange(3)):
            with timeline.measure(dice.choice(PHASES)):
                if depth < 3:
                    do(depth + 1)

    for clock in range(dice.randrange(2, 9)):
        do(0)
        if dice.random() < 0.3:
            timeline.pause()
        do(0)
        timeline.close(clock)
        ends.append(timeline.since)
    timeline.ended(Phases(1.0, 2.0))
    told = timeline.phases
    assert sum(told[phase] for phase in PHASES) == pytest.approx(ends[-1] - ends[0], abs=1e-9)
    assert [told[phase] for phase in BESIDE] == [1.0, 2.0]
    assert all(seconds >= 0 for seconds in told.values())


def test_a_file_of_an_older_zml_is_still_read_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "w0.jsonl"
    path.write_text(
        '{"clock":3,"at":1.5,"compute":0.5,"encode":0.125,"wait":0.25,"apply":0.125,"send":0.2,"pull":0.1,'
        '"bytes_up":10,"bytes_down":20}\n{"clock":4,"at":'
    )
    (step,) = read(path)
    assert (step.data, step.whole) == (0.0, 1.0)
    assert phases(step.thread(), 1.0, 10).plain == "cccccewwwa"
    lines = [line.plain for line in table("w0", [step], 10, 80)]
    assert max(map(len, lines)) <= 80 and "data 0.0 ms (0%)" in lines[1]


def test_a_bar_begins_with_what_the_loader_took() -> None:
    step = Step(1, 0.0, 0.4, 0.1, 0.1, 0.1, 0, 0, 0, 0, data=0.3)
    assert phases(step.thread(), 1.0, 20).plain == "ddddddcccccccceewwaa"
