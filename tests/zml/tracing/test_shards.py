"""What a shard remembers of workers' steps and when it tells it: nothing twice, nothing of steps that nobody keeps."""

from collections import Counter
from random import Random

import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.tracing.sampling import sampled, trace_of
from zml.tracing.shards import REMEMBERED, ShardTrace
from zml.tracing.span import Context, Span, write_header

BUCKETS = 2


class Play:
    def __init__(self) -> None:
        self.time = 50.0
        self.spans: list[Span] = []
        self.trace = ShardTrace("p0", self.spans.extend, self.now, Random(3))

    def now(self) -> float:
        self.time += 0.001
        return self.time


def context(worker: str, clock: int, leg: int, sampled: bool) -> Context:
    """As a worker would tell it: one trace for a clock, and a span of its own for each push and pull."""
    return Context(trace_of("run", "job", clock), 1 + 2 * (100 * clock + int(worker[1:])) + leg, sampled)


def step(play: Play, worker: str, clock: int, *, every: int = 0, kept: tuple[int, ...] = ()) -> None:
    """A step of one worker, for whom nobody waits."""
    is_sampled = sampled("run", "job", clock, every)
    told = [context(worker, other, 0, True) for other in kept]
    header = write_header(context(worker, clock, 0, is_sampled), told)
    for _ in range(BUCKETS):
        play.trace.pushed(worker, clock, 100)
    with play.trace.counting(worker, clock, header, BUCKETS), play.trace.applying(clock, [worker]):
        pass
    for bucket in range(BUCKETS):
        header = write_header(context(worker, clock, 1, is_sampled))
        play.trace.pulling(worker, header, bucket, parked=False)
        play.trace.pulled(worker, header, bucket, 70)


def test_of_a_sampled_step_a_shard_tells_what_it_did_below_the_workers_spans() -> None:
    play = Play()
    step(play, "w0", 4, every=1)
    push, pull = context("w0", 4, 0, True), context("w0", 4, 1, True)
    assert [(span.name, span.parent_id, span.kind) for span in play.spans] == [
        ("zml.ps.push", push.span_id, "server"),
        ("zml.ps.apply", push.span_id, "server"),
        ("zml.ps.pull", pull.span_id, "server"),
    ]
    told = [dict(span.attributes) for span in play.spans]
    assert told == [
        {"zml.shard": "p0", "zml.worker": "w0", "zml.buckets": 2, "zml.bytes": 200},
        {"zml.shard": "p0", "zml.clock": 4, "zml.workers": 1, "zml.completed_by": "w0"},
        {"zml.shard": "p0", "zml.worker": "w0", "zml.buckets": 2, "zml.bytes": 140, "zml.parked_s": 0.0},
    ]


def test_a_step_that_is_kept_later_is_told_once_and_from_memory() -> None:
    play = Play()
    step(play, "w0", 0)
    step(play, "w0", 1)
    assert play.spans == []
    ended = play.time
    step(play, "w0", 2, kept=(0,))
    step(play, "w0", 3, kept=(0, 2))
    traces = Counter(span.context.trace_id for span in play.spans)
    assert traces == {trace_of("run", "job", 0): 3, trace_of("run", "job", 2): 3}
    assert all(span.ended < ended for span in play.spans[:3])


def test_only_the_newest_steps_are_remembered() -> None:
    play = Play()
    for clock in range(1000):
        step(play, "w0", clock)
    assert len(play.trace.seen["w0"]) == REMEMBERED
    assert len(play.trace.newest) == 1
    step(play, "w0", 1000, kept=(3,))
    assert play.spans == []
    play.trace.forget("w0")
    assert (play.trace.seen, play.trace.newest, play.trace.came) == ({}, {}, {})


def test_a_header_that_cannot_be_read_is_a_step_without_a_trace() -> None:
    play = Play()
    for header in ("", "odd", "00-" + 32 * "0" + "-" + 16 * "1" + "-01"):
        play.trace.pushed("w0", 1, 5)
        with play.trace.counting("w0", 1, header, 1), play.trace.applying(1, ["w0"]):
            pass
        play.trace.pulling("w0", header, 0, parked=True)
        play.trace.waiting("w0", header, ["w1"])
        play.trace.pulled("w0", header, 0, 5)
    assert play.spans == []


def test_log_lines_of_a_step_name_its_trace_here_too() -> None:
    play = Play()
    own = context("w0", 1, 0, False)
    with play.trace.counting("w0", 1, write_header(own), BUCKETS):
        bound = structlog.contextvars.get_contextvars()
    assert bound == {"trace_id": f"{own.trace_id:032x}", "span_id": f"{own.span_id:016x}"}
    assert structlog.contextvars.get_contextvars() == {}


def test_who_is_waited_for_and_for_how_long_stands_at_a_parked_pull() -> None:
    play = Play()
    header = write_header(context("w0", 0, 0, True))
    pull = write_header(context("w0", 0, 1, True))
    play.trace.pulling("w0", pull, 0, parked=True)
    with play.trace.counting("w0", 0, header, 1):
        pass
    play.time += 1.0
    play.trace.waiting("w0", pull, ["w1", "w2"])
    play.trace.pulling("w0", pull, 0, parked=True)  # it asks again
    play.time += 0.5
    with play.trace.applying(0, ["w0"]):
        pass
    play.trace.pulled("w0", pull, 0, 9)
    [found] = [span for span in play.spans if span.name == "zml.ps.pull"]
    assert found.attributes["zml.waited_for"] == "w1, w2"
    assert 1.5 < float(found.attributes["zml.parked_s"]) < 1.52


moves = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["push", "commit", "pull", "keep", "park", "leave"]),
        st.integers(0, 9),
    ),
    max_size=60,
)


@settings(deadline=None)  # a busy machine is no failure
@given(moves, st.booleans(), st.sampled_from([0, 1, 3]))
def test_whatever_comes_in_whatever_order_no_span_comes_twice_or_hangs_in_the_air(
    done: list[tuple[int, str, int]], together: bool, every: int
) -> None:
    """Workers that push, commit, pull, are found slow and leave, in step (`together`) or each for itself."""
    play = Play()
    clocks = {f"w{index}": 0 for index in range(3)}
    committed: dict[int, list[str]] = {}
    kept: set[Context] = set()
    life: Counter[str] = Counter()

    def told(worker: str, clock: int, leg: int) -> Context:
        return context(
            f"w{int(worker[1:]) + 3 * life[worker]}", clock, leg, sampled("run", "job", clock, every)
        )

    for index, move, number in done:
        worker = f"w{index}"
        clock = clocks[worker]
        if move == "push":
            play.trace.pushed(worker, clock, number)
        elif move in ("commit", "keep"):
            earlier = [told(worker, max(0, clock - 1 - number), 0)] if move == "keep" else []
            kept |= {each._replace(sampled=True) for each in earlier}
            header = write_header(told(worker, clock, 0), [each._replace(sampled=True) for each in earlier])
            with play.trace.counting(worker, clock, header, BUCKETS):
                ready = committed.setdefault(clock, [])
                ready.append(worker)
                if not together or len(ready) == 3:
                    with play.trace.applying(clock, ready if together else [worker]):
                        pass
            clocks[worker] += 1
        elif move in ("pull", "park"):
            header = write_header(told(worker, max(0, clock - 1), 1))
            play.trace.pulling(worker, header, number % BUCKETS, parked=move == "park")
            if move == "pull":
                play.trace.pulled(worker, header, number % BUCKETS, number)
        else:
            play.trace.forget(worker)
            life[worker] += 1

    ids = [span.context.span_id for span in play.spans]
    assert len(set(ids)) == len(ids)
    wanted = {each.trace_id for each in kept} | {
        trace_of("run", "job", clock) for clock in range(70) if sampled("run", "job", clock, every)
    }
    assert {span.context.trace_id for span in play.spans} <= wanted
    for span in play.spans:
        assert span.began <= span.ended
        assert span.parent_id is not None
        assert (span.parent_id - 1) % 2 == 1 or span.name != "zml.ps.pull"
    once = Counter((span.name, span.parent_id) for span in play.spans)
    assert set(once.values()) <= {1}
