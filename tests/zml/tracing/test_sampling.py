"""Which steps are kept: the same on all workers, one in N, and every slow one."""

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.config import resolve
from zml.errors import CONFIG, USAGE, ZmlError
from zml.tracing.sampling import (
    FLOOR_S,
    LEAST,
    TIMES,
    WINDOW,
    Slow,
    asked_by,
    one_in,
    ratio,
    sampled,
    trace_of,
)

names = st.text(max_size=8)


@settings(deadline=None)  # a busy machine is no failure
@given(names, names, st.integers(1, 300), st.integers(0, 10**6))
def test_of_every_n_clocks_exactly_one_is_sampled(run: str, job: str, every: int, block: int) -> None:
    clocks = range(block * every, (block + 1) * every)
    assert sum(sampled(run, job, clock, every) for clock in clocks) == 1


def test_the_sampled_place_does_not_keep_time_with_what_happens_every_100_steps() -> None:
    places = [clock % 100 for clock in range(3000) if sampled("run", "job", clock, 100)]
    assert len(places) == 30
    assert len(set(places)) > 15


@given(names, names, st.integers(0, 10**9))
def test_nothing_is_sampled_with_zero_and_everything_with_one(run: str, job: str, clock: int) -> None:
    assert not sampled(run, job, clock, 0)
    assert sampled(run, job, clock, 1)


def test_steps_of_one_clock_share_a_trace_and_no_others_do() -> None:
    steps = [
        (run, job, clock, worker)
        for run in ("a", "b")
        for job in ("j", "k")
        for clock in range(50)
        for worker in ("", "w0", "w1")
    ]
    traces = {trace_of(*step) for step in steps}
    assert len(traces) == len(steps)
    assert trace_of("a", "j", 3) == trace_of("a", "j", 3)
    assert all(0 < trace < 2**128 for trace in traces)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.floats(0.0, 100.0), max_size=150))
def test_slow_is_what_takes_twice_the_median_of_the_newest_steps(steps: list[float]) -> None:
    slow = Slow()
    for at, seconds in enumerate(steps):
        before = steps[max(0, at - WINDOW) : at]
        usual = statistics.median_high(before) if before else 0.0
        expected = len(before) >= LEAST and seconds > TIMES * usual and seconds > usual + FLOOR_S
        assert slow.usual_s == usual
        assert slow.look(seconds) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, ("OTEL_EXPORTER_OTLP_ENDPOINT", "1/100")),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"},
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "1/100"),
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "True"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_EXPORTER": "none"}, None),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://a",
                "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
                "OTEL_TRACES_SAMPLER_ARG": "0.001",
            },
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "1/1000"),
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_SAMPLER": "always_off"},
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "slow"),
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_TRACES_SAMPLER": "always_on"},
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "1/1"),
        ),
    ],
)
def test_opentelemetrys_variables_turn_tracing_on(
    environment: dict[str, str], expected: tuple[str, str] | None
) -> None:
    assert asked_by(environment) == expected
    resolved = resolve({}, environment)
    assert (resolved.origins["trace"], resolved.settings.trace) == (expected or ("default", "off"))


def test_what_is_set_goes_before_opentelemetrys_variables() -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "ZML_TRACE": "off"}
    assert resolve({}, environment).settings.trace == "off"
    assert resolve({"trace": "1/7"}, environment).settings.trace == "1/7"
    assert [one_in(text) for text in ("off", "slow", "1/1", "1/100")] == [0, 0, 1, 100]


@given(st.text(max_size=6))
def test_a_value_that_means_nothing_is_refused_with_the_choices(text: str) -> None:
    try:
        resolve({"trace": text}, {})
    except ZmlError as error:
        assert (error.code, error.fix) == (
            USAGE,
            "Write 1/N for one step in N, slow for none but slow and failed ones, or off.",
        )
    else:
        assert text in ("off", "slow") or text.startswith("1/")
    with pytest.raises(ZmlError) as refused:
        resolve({}, {"ZML_TRACE": "1/0"})
    assert refused.value.code == CONFIG


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_ratio_is_a_setting(part: float) -> None:
    assert resolve({"trace": ratio(str(part))}, {}).settings.trace
    assert ratio("odd") == "1/1"
    assert ratio("0") == "slow"
