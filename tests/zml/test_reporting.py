"""What a script counts of itself, and how it travels: to the coordinator in a header, to its agent in shared memory."""

import importlib.util
import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tests.zml.test_data import Alone, numbers
from zml import gpu
from zml.agent.tally import _HEAD as HEAD
from zml.agent.tally import _PLACE as PLACE
from zml.agent.tally import VARIABLE, AgentTally, ScriptTally
from zml.figures import (
    APPLY_BOUNDS_S,
    BESIDE,
    MOST_WORDS,
    PHASES,
    STALENESS_BOUNDS,
    STEP_BOUNDS_S,
    GpuFigures,
    ShardFigures,
    WorkerFigures,
    after,
)
from zml.messages import AnyMessage, Gauge, Report
from zml.noise import Estimate
from zml.transport.frames import Envelope, Kind, pack
from zml.transport.peers import HEADER_BYTES
from zml.worker.auto import SETTINGS
from zml.worker.data import DividedLoader
from zml.worker.reporting import Meter, Reports, fitting, learning_rate
from zml.worker.timeline import Timeline

MOST = 2**63 - 1
LONGEST = 0.1 + 0.2  # a double with all of its digits


def largest(kind: type[Any]) -> Any:
    """Figures of which every field takes as many bytes as it can."""
    classes = {
        "step_s": [MOST] * (len(STEP_BOUNDS_S) + 1),
        "staleness": [MOST] * (len(STALENESS_BOUNDS) + 1),
        "apply_s": [MOST] * (len(APPLY_BOUNDS_S) + 1),
        "phases": dict.fromkeys((*PHASES, *BESIDE), LONGEST),
        "compress": max(map(str, SETTINGS), key=len),
        "no_room": "x" * MOST_WORDS,
        "gpu": GpuFigures(utilization=LONGEST, memory_used_bytes=MOST, memory_bytes=MOST, power_w=LONGEST),
    }
    numbers = {
        field: LONGEST if field.endswith("_s") or field == "learning_rate" else MOST
        for field in kind.__struct_fields__
    }
    return kind(**{name: classes.get(name, number) for name, number in numbers.items()})


def header(message: msgspec.Struct) -> bytes:
    """Raises LocalProtocolError where it does not fit."""
    return pack(Envelope(kind=Kind.NOTICE, session=2**63, id=2**63, floor=2**63, credit=2**63, body=message))


def test_the_largest_report_fits_into_a_header() -> None:
    values = fitting({f"{'ä' * 20}{number}": LONGEST for number in range(1000)})
    assert len(values) > 30
    report = Report(
        job="j" * 100,
        worker="w" + "9" * 20,
        incarnation=MOST,
        steps=MOST,
        epoch=MOST,
        epochs=MOST,
        samples=MOST,
        staleness=MOST,
        values=values,
        figures=largest(WorkerFigures),
    )
    assert 2_800 < len(header(report)) <= HEADER_BYTES


def test_the_largest_gauge_fits_into_a_header() -> None:
    gauge = Gauge(
        job="j" * 100,
        member="p" + "9" * 20,
        incarnation=MOST,
        shard="p" + "9" * 20,
        updates=MOST,
        factor=LONGEST,
        because="b" * 200,
        change=(LONGEST, "c" * 200),
        late=LONGEST,
        damping=LONGEST,
        noise=Estimate(MOST, LONGEST, LONGEST),
        holders=MOST,
        step_times=[(MOST, MOST, LONGEST)] * 64,
        figures=largest(ShardFigures),
    )
    assert 2_000 < len(header(gauge)) <= HEADER_BYTES


@pytest.mark.parametrize("kind", [WorkerFigures, ShardFigures])
def test_figures_travel_whole(kind: type[Any]) -> None:
    told = largest(kind)
    message: Any = (
        Report(job="j", worker="w0", incarnation=1, steps=1, epoch=0, figures=told)
        if kind is WorkerFigures
        else Gauge(job="j", member="p0", incarnation=1, shard="p0", updates=1, figures=told)
    )
    came: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=AnyMessage)
    assert came.figures == told


@given(st.dictionaries(st.text(max_size=300), st.floats(allow_nan=False), max_size=40))
def test_of_the_values_of_a_script_as_many_are_told_as_fit(values: dict[str, float]) -> None:
    told = fitting(values)
    assert list(told.items()) == list(values.items())[: len(told)], "the first ones"
    assert len(msgspec.msgpack.encode(told)) <= 2010
    if len(told) < len(values):
        assert len(msgspec.msgpack.encode(told)) > 1600


def test_a_step_is_counted_with_its_time_and_its_staleness(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    timeline = Timeline()
    meter = Meter(timeline)
    for now, staleness in ((1.0, 0), (1.004, 1), (1.054, 3), (9.0, 100)):
        if now == 9.0:
            now = 8.0
            timeline.pause()  # an epoch ends
            now = 9.0
        meter.stepped(staleness)
    told = meter.figures(0.1)
    assert told.steps == 4 and told.step_sum_s == pytest.approx(0.004 + 0.05 + 1.0)
    assert told.step_s == [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0], "of the first, nobody knows the beginning"
    assert told.staleness == [1, 1, 0, 1, 0, 0, 0, 1] and told.staleness_sum == 104
    assert told.learning_rate == 0.1


def test_the_learning_rate_is_that_of_the_first_group_whatever_it_is_kept_in() -> None:
    assert learning_rate([{"lr": 0.1}, {"lr": 0.2}]) == 0.1
    assert learning_rate([{"lr": torch.tensor(0.25)}]) == 0.25
    without: list[list[dict[str, Any]]] = [[], [{}], [{"lr": None}], [{"lr": torch.ones(2)}]]
    assert [learning_rate(groups) for groups in without] == [None] * 4


def test_the_time_inside_of_a_divided_loader_is_seen() -> None:
    seen: list[str] = []

    class Looking(Alone):
        def reading(self, items: Iterator[Any]) -> Iterator[Any]:
            seen.append("reading")
            return items

    loader: DataLoader[Any] = DataLoader(numbers(8), batch_size=2)
    assert len(list(DividedLoader(loader, Looking()))) == 4
    assert seen == ["reading"]


# -- the agent --------------------------------------------------------------------------------------------


@pytest.fixture
def agent() -> Iterator[AgentTally]:
    made = AgentTally()
    yield made
    made.close()


def script_of(agent: AgentTally) -> ScriptTally:
    """Its end, in this process: it closes the number that it was given."""
    return ScriptTally({VARIABLE: str(os.dup(agent.file))})


def test_an_agent_reads_the_newest_figures_whenever_it_looks(agent: AgentTally) -> None:
    assert agent.figures() is None
    script = script_of(agent)
    for steps in range(1, 6):
        script.tell(WorkerFigures(steps=steps))
        assert agent.figures() == WorkerFigures(steps=steps)
    script.begin(3, 4)
    assert agent.read() == (3, 4) and agent.figures() == WorkerFigures(steps=5)
    script.tell(largest(WorkerFigures))
    assert agent.figures() == largest(WorkerFigures)
    agent.close()
    assert agent.figures() is None


@pytest.mark.parametrize("bytes_written", [0, 1, 100])
def test_a_script_that_dies_while_it_tells_has_told_what_it_told_before(
    agent: AgentTally, bytes_written: int
) -> None:
    script = script_of(agent)
    script.tell(WorkerFigures(steps=1))
    script.tell(WorkerFigures(steps=2))
    told = msgspec.msgpack.encode(WorkerFigures(steps=3, samples=7))
    os.pwrite(agent.file, told[:bytes_written], 8 + PLACE + HEAD.size)  # where the first was
    assert agent.figures() == WorkerFigures(steps=2)


@given(st.lists(st.tuples(st.integers(0, 2 * PLACE + 7), st.binary(min_size=1, max_size=60)), max_size=5))
def test_whatever_a_script_does_to_the_memory_its_agent_reads_figures_or_none(
    spoiled: list[tuple[int, bytes]],
) -> None:
    agent = AgentTally()
    script = script_of(agent)
    told = [WorkerFigures(steps=steps) for steps in (1, 2)]
    for figures in told:
        script.tell(figures)
    for at, data in spoiled:
        os.pwrite(agent.file, data, at)
    assert agent.figures() in (None, *told)
    agent.close()


@pytest.mark.parametrize("wrong", [{"step_s": [1, 2]}, {"staleness": [1] * 9}, {"steps": "many"}])
def test_figures_that_are_none_are_not_believed(agent: AgentTally, wrong: dict[str, Any]) -> None:
    script_of(agent).tell(msgspec.structs.replace(WorkerFigures(), **wrong))
    assert agent.figures() is None


def test_nothing_is_told_where_there_is_no_agent() -> None:
    ScriptTally({}).tell(WorkerFigures(steps=1))


def test_a_script_says_what_its_process_takes() -> None:
    told: list[WorkerFigures] = []
    io = SimpleNamespace(post=lambda what, *given: what(*given))
    tally = SimpleNamespace(tell=told.append)
    reports: Any = Reports(cast(Any, None), cast(Any, io), cast(Any, tally), Timeline())
    reports.begin(SimpleNamespace(param_groups=[{"lr": 0.5}]))
    (figures,) = told
    assert 0 < figures.cpu_s <= time.process_time() + 0.001
    assert figures.open_files >= 3 and figures.memory_bytes > 0 and figures.learning_rate == 0.5


figures_of = st.builds(
    WorkerFigures,
    steps=st.integers(0, 100),
    samples=st.integers(0, 100),
    phases=st.dictionaries(st.sampled_from((*PHASES, *BESIDE)), st.integers(0, 100).map(float)),
    step_s=st.one_of(st.just([]), st.lists(st.integers(0, 9), min_size=13, max_size=13)),
    staleness=st.one_of(st.just([]), st.lists(st.integers(0, 9), min_size=8, max_size=8)),
    sent_bytes=st.integers(0, 100),
    learning_rate=st.one_of(st.none(), st.just(0.1)),
    memory_bytes=st.integers(0, 100),
    cpu_s=st.integers(0, 100).map(float),
    open_files=st.integers(0, 100),
)


@given(st.lists(figures_of, max_size=4))
def test_over_the_lives_of_a_script_counters_only_grow(lives: list[WorkerFigures]) -> None:
    whole, seen = WorkerFigures(), WorkerFigures()
    for life in lives:
        for told in (None, WorkerFigures(), life):  # it has not joined, it has just joined, it has worked
            shown = after(whole, told)
            assert (
                shown.steps >= seen.steps
                and shown.cpu_s >= seen.cpu_s
                and shown.sent_bytes >= seen.sent_bytes
            )
            assert all(shown.phases.get(phase, 0.0) >= spent for phase, spent in seen.phases.items())
            assert sum(shown.step_s) >= sum(seen.step_s)
            seen = shown
        whole = seen
        assert (whole.memory_bytes, whole.learning_rate) == (life.memory_bytes, life.learning_rate)
        assert whole.open_files == life.open_files
    assert whole.steps == sum(life.steps for life in lives)
    assert sum(whole.staleness) == sum(sum(life.staleness) for life in lives)


# -- the GPU -----------------------------------------------------------------------------------------------


class Driver:
    """nvidia-ml-py, of a card that does not tell its power."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Any:
        return SimpleNamespace(used=1 << 30, total=80 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> Any:
        raise self.NVMLError("not supported")


def test_what_a_driver_does_not_know_is_none() -> None:
    assert gpu.figures(Driver(), object()) == GpuFigures(
        utilization=0.75, memory_used_bytes=1 << 30, memory_bytes=80 << 30, power_w=None
    )


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_script_without_a_gpu_asks_no_driver(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("it asks"))
    assert gpu.Watch(visible).now is None
