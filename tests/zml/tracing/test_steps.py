"""One worker's steps as spans, with a clock that the test moves."""

from random import Random

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.iothread import IoThread
from zml.tracing.sampling import LEAST, trace_of
from zml.tracing.span import Span, read_header
from zml.tracing.steps import Origin, StepTrace

ORIGIN = Origin("run", "job", "w0", 1)


class Play:
    """A worker with two shards, in sync: computes, encodes, pushes, waits, applies."""

    def __init__(self, every: int, origin: Origin = ORIGIN) -> None:
        self.time = 100.0
        self.spans: list[Span] = []
        self.trace = StepTrace(origin, every, self.spans.extend, lambda: self.time, Random(5))
        self.trace.pause()
        self.headers: list[tuple[str, str]] = []  # of commits and pulls

    def phase(self, name: str, seconds: float) -> None:
        began, self.time = self.time, self.time + seconds
        self.trace.phase(name, began, self.time)

    def compute(self, clock: int, seconds: float = 0.1) -> None:
        self.phase("data", 0.01)
        self.time += seconds
        self.trace.at(clock)
        for shard in ("p0", "p1"):
            self.phase("encode", 0.005)
            self.trace.pushing(clock, shard, 1000)

    def exchange(self, clock: int) -> None:
        for shard in ("p0", "p1"):
            header = self.trace.committing(clock, shard, epoch=2)
            self.headers.append((header, self.trace.pulling(clock, shard)))
        began, self.time = self.time, self.time + 0.02
        for shard in ("p0", "p1"):
            self.trace.counted(clock, shard)
        self.time += 0.01
        for shard in ("p0", "p1"):
            self.trace.pulled(clock, shard, 700)
        self.trace.phase("wait", began, self.time)

    def step(self, clock: int, seconds: float = 0.1) -> None:
        self.compute(clock, seconds)
        self.exchange(clock)
        self.phase("apply", 0.002)
        self.trace.close(clock, 2000, 1400)


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def times(span: Span, since: float) -> tuple[float, float]:
    return round(span.began - since, 6), round(span.ended - since, 6)


def test_a_step_is_one_tree_of_what_the_worker_did() -> None:
    play = Play(1)
    play.step(0)
    step, *parts = play.spans
    assert (step.name, step.parent_id, step.error) == ("zml.step", None, "")
    assert step.attributes == {
        "zml.job": "job",
        "zml.worker": "w0",
        "zml.incarnation": 1,
        "zml.clock": 0,
        "zml.epoch": 2,
        "zml.kept": "sampled",
        "zml.sent_bytes": 2000,
        "zml.received_bytes": 1400,
    }
    assert {part.parent_id for part in parts} == {step.context.span_id}
    assert {span.context.trace_id for span in play.spans} == {trace_of("run", "job", 0)}
    assert len({span.context.span_id for span in play.spans}) == len(play.spans)
    assert [(part.name, part.attributes.get("zml.shard", ""), times(part, 100)) for part in parts] == [
        ("zml.compute", "", (0.01, 0.12)),
        ("zml.data", "", (0.0, 0.01)),
        ("zml.encode", "", (0.11, 0.12)),
        ("zml.wait", "", (0.12, 0.15)),
        ("zml.apply", "", (0.15, 0.152)),
        ("zml.push", "p0", (0.115, 0.14)),
        ("zml.push", "p1", (0.12, 0.14)),
        ("zml.pull", "p0", (0.12, 0.15)),
        ("zml.pull", "p1", (0.12, 0.15)),
    ]
    assert named(parts, "zml.compute")[0].attributes == {"zml.busy_s": 0.1}
    assert named(parts, "zml.pull")[0].attributes == {"zml.shard": "p0", "zml.buckets": 1, "zml.bytes": 700}


def test_a_phase_that_comes_back_later_in_the_step_is_a_span_of_its_own() -> None:
    """As with gradients of two batches, and a wait for the first of them."""
    play = Play(1)
    play.phase("wait", 0.2)
    play.phase("data", 0.01)
    play.time += 0.3
    play.phase("data", 0.01)
    play.time += 0.2
    play.phase("encode", 0.001)
    play.time += 0.05  # less than a tenth of the step lies between the two
    play.phase("encode", 0.001)
    play.phase("wait", 0.1)
    play.exchange(0)
    play.trace.close(0, 0, 0)
    thread = [
        (span.name.removeprefix("zml."), *times(span, 100), span.attributes["zml.busy_s"])
        for span in play.spans
        if "zml.busy_s" in span.attributes
    ]
    assert thread == [
        ("compute", 0.21, 0.772, 0.55),  # so short a time for the second batch does not divide it
        ("data", 0.2, 0.21, 0.01),
        ("data", 0.51, 0.52, 0.01),
        ("encode", 0.72, 0.772, 0.002),
        ("wait", 0.0, 0.2, 0.2),
        ("wait", 0.772, 0.902, 0.13),
    ]


def test_a_step_of_a_million_pieces_is_no_larger_than_one_of_a_thousand() -> None:
    play = Play(1)
    for _ in range(5000):
        play.phase("wait", 0.001)
    assert len(play.trace.phases["wait"]) == 1000
    play.trace.close(0, 0, 0)
    play.trace.end()
    assert [(span.name, times(span, 100)) for span in play.spans] == [
        ("zml.step", (0.0, 5.0)),
        ("zml.wait", (0.0, 5.0)),
    ]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["data", "encode", "wait", "apply", ""]),
            st.integers(0, 1000).map(lambda ms: ms / 1000),
        ),
        max_size=40,
    )
)
def test_whatever_a_step_does_its_phases_lie_within_it_and_add_up(done: list[tuple[str, float]]) -> None:
    play = Play(1)
    spent = dict.fromkeys(("data", "encode", "wait", "apply", ""), 0.0)
    for name, seconds in done:
        spent[name] += seconds
        if name:
            play.phase(name, seconds)
        else:
            play.time += seconds
    play.trace.close(0, 0, 0)
    play.trace.end()
    step, *parts = play.spans
    whole = step.ended - step.began
    busy = dict.fromkeys(spent, 0.0)
    for part in parts:
        assert step.began <= part.began <= part.ended <= step.ended
        busy[part.name.removeprefix("zml.").replace("compute", "")] += float(part.attributes["zml.busy_s"])
    computing = busy.pop("")
    assert busy == pytest.approx({name: spent[name] for name in busy}, abs=1e-4)
    assert spent[""] - 0.01 * whole * (len(done) + 1) - 1e-4 <= computing <= spent[""] + 1e-4


def test_the_headers_name_the_spans_of_the_push_and_of_the_pull() -> None:
    play = Play(1)
    play.step(0)
    told = [read_header(header)[0] for pair in play.headers for header in pair]
    legs = [*named(play.spans, "zml.push"), *named(play.spans, "zml.pull")]
    assert {context.span_id for context in told if context} == {leg.context.span_id for leg in legs}
    assert all(context is not None and context.sampled for context in told)


def test_of_a_step_that_is_not_kept_nothing_is_left_but_what_its_headers_say() -> None:
    play = Play(0)
    for clock in range(50):
        play.step(clock)
    assert play.spans == []
    own = [read_header(header) for pair in play.headers for header in pair]
    assert all(context is not None and not context.sampled and kept == [] for context, kept in own)
    assert list(play.trace.steps) == [50], "the one that its log lines belong to now"


def test_a_slow_step_is_kept_and_each_shard_is_told_once_with_its_next_message() -> None:
    play = Play(0)
    for clock in range(LEAST + 2):
        play.step(clock)
    slow = LEAST + 2
    play.step(slow, seconds=1.0)
    step = play.spans[0]
    assert (step.attributes["zml.kept"], step.attributes["zml.clock"]) == ("slow", slow)
    assert step.attributes["zml.usual_s"] == 0.152
    assert len(play.spans) == 10
    play.headers.clear()
    play.step(slow + 1)
    told = [read_header(header)[1] for pair in play.headers for header in pair]
    kept = step.context._replace(sampled=True)
    assert told == [[kept], [], [kept], []], "with the commit, and no more with the pull"


def test_a_step_that_fails_is_kept_with_its_error_and_whoever_gave_no_answer() -> None:
    play = Play(0)
    play.step(0)
    play.compute(1)
    play.trace.committing(1, "p0", epoch=2)
    play.time += 5.0
    play.trace.fail(1, "ValueError")
    step, *parts = play.spans
    assert (step.error, step.attributes["zml.kept"], times(step, 100.152)) == (
        "ValueError",
        "failed",
        (0.0, 5.12),
    )
    assert [(part.name, part.error) for part in parts] == [
        ("zml.compute", ""),
        ("zml.data", ""),
        ("zml.encode", ""),
        ("zml.push", "no answer"),
        ("zml.push", "no answer"),
    ]
    play.trace.end()
    assert len(play.spans) == 6, "and not once more at the end"


def test_a_script_that_fails_before_anything_has_left_fails_in_its_step_too() -> None:
    play = Play(0)
    play.time += 0.3
    play.trace.fail(7, "ZeroDivisionError")
    assert [(span.name, span.error, times(span, 100)) for span in play.spans] == [
        ("zml.step", "ZeroDivisionError", (0.0, 0.3)),
        ("zml.compute", "", (0.0, 0.3)),
    ]


def test_with_overlap_a_step_is_told_when_its_exchange_is_over() -> None:
    play = Play(1)
    play.compute(0)
    play.trace.committing(0, "p0", 0)
    play.trace.committing(0, "p1", 0)
    play.trace.close(0, 2000, 0)
    assert play.spans == [], "its exchange is on the way"
    play.compute(1)
    for shard in ("p0", "p1"):
        play.trace.counted(0, shard)
        play.trace.pulling(0, shard)
        play.trace.pulled(0, shard, 700)
    for _ in range(2):
        play.trace.pulling(1, "p0")
    play.trace.counted(1, "p0")
    play.trace.counted(1, "p1")
    play.trace.pulled(1, "p0", 1)
    play.trace.close(1, 2000, 700)
    assert [step.clock for step in play.trace.over] == [1], "half of its parameters are here"
    step = play.spans[0]
    assert [span.name for span in play.spans].count("zml.step") == 1
    assert max(span.ended for span in named(play.spans, "zml.pull")) > step.ended, "beside the next step"
    play.trace.end()
    assert [span.attributes["zml.clock"] for span in named(play.spans, "zml.step")] == [0, 1]


def test_an_evaluation_between_two_steps_belongs_to_neither_and_makes_none_slow() -> None:
    play = Play(0)
    for clock in range(LEAST + 2):
        play.step(clock)
    play.time += 60
    play.trace.pause()
    play.step(LEAST + 2)
    assert play.spans == []


def test_who_is_waited_for_stands_at_the_pull() -> None:
    play = Play(1)
    play.compute(0)
    for shard in ("p0", "p1"):
        play.trace.committing(0, shard, 0)
        play.trace.pulling(0, shard)
        play.trace.waiting(0, shard, ["w2", "w3"])
        play.trace.counted(0, shard)
        play.trace.pulled(0, shard, 1)
    play.trace.close(0, 0, 0)
    assert [pull.attributes["zml.waited_for"] for pull in named(play.spans, "zml.pull")] == [
        "w2, w3",
        "w2, w3",
    ]


def test_without_a_bound_each_workers_step_is_a_trace_of_its_own() -> None:
    traces = set()
    for worker in ("w0", "w1"):
        play = Play(1, Origin("run", "job", worker, 1, alone=True))
        play.step(0)
        traces |= {span.context.trace_id for span in play.spans}
    assert traces == {trace_of("run", "job", 0, "w0"), trace_of("run", "job", 0, "w1")}


def test_log_lines_of_a_step_name_its_trace_and_span() -> None:
    play = Play(1)
    play.compute(3)
    bound = structlog.contextvars.get_contextvars()
    play.exchange(3)
    play.trace.close(3, 0, 0)
    step = play.spans[0]
    assert (bound["trace_id"], bound["span_id"]) == (
        f"{step.context.trace_id:032x}",
        f"{step.context.span_id:016x}",
    )
    assert structlog.contextvars.get_contextvars()["trace_id"] == f"{trace_of('run', 'job', 4):032x}"
    play.trace.end()
    assert "trace_id" not in structlog.contextvars.get_contextvars()


def test_lines_of_the_io_thread_belong_to_the_step_that_asked_for_its_work() -> None:
    play, io = Play(1), IoThread("test")
    try:
        play.compute(3)

        async def bound() -> dict[str, object]:
            return structlog.contextvars.get_contextvars()

        told = io.call(bound())
        assert told["trace_id"] == f"{trace_of('run', 'job', 3):032x}"
    finally:
        play.trace.end()
        io.close()


def test_a_clock_that_was_pushed_and_never_committed_is_forgotten() -> None:
    play = Play(1)
    play.trace.pushing(0, "p0", 10)  # then the worker rested
    play.step(5)
    assert list(play.trace.steps) == [6]
