"""Spans to a receiver of OTLP over HTTP, by OpenTelemetry's own SDK. The only module that imports it.

Where they go, with which headers, certificates and compression, the SDK reads from its own variables (OTEL_*), as it
does in any program. Its global tracer provider is left alone: that one is the script's.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from .outlet import THREAD
from .span import Context, Span

KINDS = {
    "internal": trace.SpanKind.INTERNAL,
    "client": trace.SpanKind.CLIENT,
    "server": trace.SpanKind.SERVER,
}


class Otlp:
    """The `send` of an outlet: called by its thread alone."""

    def __init__(self, attributes: Mapping[str, str | int], exporter: SpanExporter | None = None) -> None:
        """`attributes` of the process; what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say goes before them."""
        self.exporter = exporter or plain_exporter()
        self.ids = GivenIds()
        self.ended: list[ReadableSpan] = []
        # Once for the process, so that spans stay nested whatever is done to the machine's clock.
        self.offset_ns = offset_ns()
        resource = Resource.create(dict(attributes)).merge(OTELResourceDetector().detect())
        provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self.ids)
        provider.add_span_processor(Collect(self.ended))
        self.tracer = provider.get_tracer("zml")

    def __call__(self, spans: Sequence[Span]) -> bool:
        for span in spans:
            self._make(span)
        made = list(self.ended)
        self.ended.clear()
        return self.exporter.export(made) is SpanExportResult.SUCCESS

    def close(self) -> None:
        """Also ends an export under way that waits to try again."""
        self.exporter.shutdown()

    def _make(self, span: Span) -> None:
        self.ids.next = span.context
        above = contexts.Context()
        if span.parent_id is not None:
            above = trace.set_span_in_context(
                trace.NonRecordingSpan(told(Context(span.context.trace_id, span.parent_id, True))), above
            )
        made = self.tracer.start_span(
            span.name,
            above,
            KINDS[span.kind],
            dict(span.attributes),
            [trace.Link(told(link)) for link in span.links],
            self._at(span.began),
        )
        if span.error:
            made.set_status(trace.StatusCode.ERROR, span.error)
        made.end(self._at(span.ended))

    def _at(self, seconds: float) -> int:
        return int(seconds * 1e9) + self.offset_ns


def offset_ns() -> int:
    """What makes a time of day of a moment of the steady clock: of some readings the one that was interrupted least."""
    readings = []
    for _ in range(10):
        before, now, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, now - (before + after) // 2))
    return min(readings)[1]


class GivenIds(IdGenerator):
    """A span's ids were told to other processes before it was made."""

    def __init__(self) -> None:
        self.next = Context(1, 1, True)

    def generate_span_id(self) -> int:
        return self.next.span_id

    def generate_trace_id(self) -> int:
        return self.next.trace_id


class Collect(SpanProcessor):
    """Keeps what has ended, for the one who made it."""

    def __init__(self, ended: list[ReadableSpan]) -> None:
        self.ended = ended

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)


def told(context: Context) -> trace.SpanContext:
    return trace.SpanContext(context.trace_id, context.span_id, True, trace.TraceFlags(int(context.sampled)))


def plain_exporter() -> SpanExporter:
    """The SDK's, but that it disturbs no script: neither by the numbers that it draws nor by what it prints."""
    own = random.Random()
    for name, module in list(sys.modules.items()):
        # It draws its pauses from Python's global generator, which a script may have seeded for its data.
        if name.startswith("opentelemetry.exporter.") and getattr(module, "random", None) is random:
            module.random = own  # type: ignore[attr-defined]
    for name in (trace_exporter.__name__, "opentelemetry.exporter.otlp.common.http"):
        logging.getLogger(name).addFilter(not_ours)
    return trace_exporter.OTLPSpanExporter()


def not_ours(record: logging.LogRecord) -> bool:
    """That a receiver does not answer is said by the outlet, once a minute."""
    return threading.current_thread().name != THREAD


def batching() -> dict[str, int | float]:
    """How an outlet queues, as the variables of OpenTelemetry's own batch processor say."""
    most = number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
    batch = number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
    return {"most": most, "batch": batch, "delay_s": number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000}


def number(name: str, usual: int) -> int:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdigit() and int(text) > 0 else usual
