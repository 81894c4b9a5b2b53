"""Spans on their way out: nobody waits for a receiver, and what is lost is counted."""

import random
import threading
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.zml.tracing.receiver import Receiver
from zml.tracing import process
from zml.tracing.otlp import Otlp
from zml.tracing.outlet import Outlet
from zml.tracing.span import Context, Span

DEADLINE_S = 20.0


def span(number: int, **more: object) -> Span:
    return Span("zml.step", Context(7, number, True), None, 1.0, 2.0, **more)  # type: ignore[arg-type]


def test_spans_arrive_in_order_and_the_last_ones_with_the_end() -> None:
    arrived: list[Span] = []

    def send(spans: list[Span]) -> bool:
        arrived.extend(spans)
        return True

    outlet = Outlet(send, batch=3, delay_s=60)
    for number in range(1, 8):
        outlet.emit([span(number)])
    assert outlet.close(DEADLINE_S)
    assert [each.context.span_id for each in arrived] == [1, 2, 3, 4, 5, 6, 7]
    assert (outlet.sent, outlet.dropped) == (7, 0)
    outlet.emit([span(8)])
    assert outlet.dropped == 1, "too late"


def test_a_receiver_that_hangs_delays_nobody_and_what_finds_no_room_is_counted() -> None:
    hangs = threading.Event()

    def send(spans: list[Span]) -> bool:
        hangs.wait(DEADLINE_S)
        return True

    outlet = Outlet(send, most=10, batch=4, delay_s=0.001)
    began = time.monotonic()
    for number in range(1, 101):
        outlet.emit([span(number), span(1000 + number)])
    assert not outlet.close(0.05)
    assert time.monotonic() - began < DEADLINE_S / 2
    assert (outlet.sent, outlet.dropped) == (0, 200)
    hangs.set()
    outlet.thread.join(DEADLINE_S)
    assert (outlet.sent, outlet.dropped) == (0, 200), "what was given up is not counted twice"


def test_half_a_step_is_not_sent() -> None:
    arrived: list[Span] = []

    def send(spans: list[Span]) -> bool:
        arrived.extend(spans)
        return True

    outlet = Outlet(send, most=5, batch=5, delay_s=60)
    outlet.emit([span(number) for number in range(1, 4)])
    outlet.emit([span(number) for number in range(4, 7)])
    outlet.emit([span(7)])
    outlet.close(DEADLINE_S)
    assert [each.context.span_id for each in arrived] == [1, 2, 3, 7]
    assert outlet.dropped == 3


def test_whatever_goes_wrong_while_sending_costs_those_spans_only() -> None:
    calls = []

    def send(spans: list[Span]) -> bool:
        calls.append(len(spans))
        if len(calls) == 1:
            raise OSError("no route to host")
        return len(calls) > 2

    outlet = Outlet(send, batch=1, delay_s=60)
    for number in range(1, 4):
        outlet.emit([span(number)])
    outlet.close(DEADLINE_S)
    assert (calls, outlet.sent, outlet.dropped) == ([1, 1, 1], 1, 2)


def made(spans: list[Span], **attributes: str) -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    assert Otlp(attributes, exporter)(spans)
    return exporter.get_finished_spans()


def test_opentelemetry_gets_the_ids_and_times_that_were_told_to_others() -> None:
    link = Context(7, 99, True)
    root, child = made(
        [
            span(1),
            Span(
                "zml.push",
                Context(7, 2, True),
                1,
                1.25,
                1.5,
                "client",
                {"zml.shard": "p0"},
                "no answer",
                (link,),
            ),
        ]
    )
    assert root.context is not None and child.context is not None and child.parent is not None
    assert (root.context.trace_id, root.context.span_id, root.parent) == (7, 1, None)
    assert (child.context.trace_id, child.context.span_id, child.parent.span_id) == (7, 2, 1)
    assert (child.name, child.kind.name, child.status.status_code.name, child.status.description) == (
        "zml.push",
        "CLIENT",
        "ERROR",
        "no answer",
    )
    assert dict(child.attributes or {}) == {"zml.shard": "p0"}
    assert [each.context.span_id for each in child.links] == [99]
    assert root.start_time is not None and root.end_time is not None and child.start_time is not None
    assert (root.end_time - root.start_time, child.start_time - root.start_time) == (10**9, 25 * 10**7)


def test_a_moment_of_the_steady_clock_becomes_the_time_of_day() -> None:
    now = time.perf_counter()
    [found] = made([Span("zml.step", Context(7, 1, True), None, now, now)])
    assert found.start_time == pytest.approx(time.time_ns(), abs=10**9)


def test_what_the_users_variables_say_of_the_process_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"service.name": "zml-worker", "service.instance.id": "w0"}
    [found] = made([span(1)], **mine)
    assert found.resource.attributes["service.name"] == "zml-worker"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=lab")
    [found] = made([span(1)], **mine)
    told = found.resource.attributes
    assert (told["service.name"], told["service.instance.id"], told["deployment.environment"]) == (
        "mine",
        "w0",
        "lab",
    )


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    process.end(0.1)


def test_a_process_sends_to_the_endpoint_of_the_environment(tracing: pytest.MonkeyPatch) -> None:
    from zml.tracing import emit, on

    with Receiver() as receiver:
        tracing.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        tracing.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        process.begin("1/10", "shard", "p3", "job")
        assert on()
        random.seed(1)
        before = random.getstate()
        emit([span(1), span(2)])
        process.end(DEADLINE_S)
        assert random.getstate() == before, "a script's random numbers are its own"
        assert not on()
        process.end(DEADLINE_S)
    assert [(each.service, each.instance, each.span) for each in receiver.spans] == [
        ("zml-shard", "p3", f"{1:016x}"),
        ("zml-shard", "p3", f"{2:016x}"),
    ]


def test_a_dead_receiver_costs_spans_and_says_nothing_on_standard_error(
    tracing: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tracing.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    process.begin("1/1", "worker", "w0", "job")
    assert process._running is not None
    outlet, _ = process._running
    outlet.emit([span(1)])
    began = time.monotonic()
    process.end(0.2)
    assert time.monotonic() - began < DEADLINE_S / 2
    outlet.thread.join(DEADLINE_S)
    assert (outlet.sent, outlet.dropped) == (0, 1)
    assert "Transient error" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"])
def test_opentelemetrys_own_switch_is_a_switch(tracing: pytest.MonkeyPatch, name: str) -> None:
    tracing.setenv(name, "true" if name == "OTEL_SDK_DISABLED" else "none")
    process.begin("1/1", "worker", "w0", "job")
    assert process._running is None


def test_an_exporter_that_refuses_is_a_failure() -> None:
    class Refuses(InMemorySpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.FAILURE

    assert not Otlp({}, Refuses())([span(1)])
