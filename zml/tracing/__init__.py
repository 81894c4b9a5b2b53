"""Traces: one step across all its processes, for Jaeger and whatever else takes OTLP.

    zml run --trace 1/100 train.py        one step in 100, and every slow or failed one

`sampling` says which steps, `steps` and `shards` make spans of what was measured, `outlet` hands them to a thread and
never waits, `otlp` is the only module that imports OpenTelemetry. Rules: while tracing is off nothing of it is loaded;
what goes wrong with a trace costs spans, which are counted, and never a step.

What is here belongs to the process, as its logs do: whoever has spans calls `emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .span import Span

_sink: Callable[[Sequence[Span]], None] | None = None


def into(sink: Callable[[Sequence[Span]], None] | None) -> None:
    """From now on spans of this process go there; None: nowhere, tracing is off."""
    global _sink
    _sink = sink


def on() -> bool:
    return _sink is not None


def emit(spans: Sequence[Span]) -> None:
    if _sink is not None:
        _sink(spans)
