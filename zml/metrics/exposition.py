"""Points as text that Prometheus reads: https://prometheus.io/docs/instrumenting/exposition_formats/, or OpenMetrics
where the one who asks prefers it. What makes the text is prometheus-client; here are the families, in the order of the
catalog, made anew for each scrape.

Rule: whatever is in a label (names come from scripts and peers), the text can be read, and no series is in it twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import cast

from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .catalog import METRICS, Metric, Role
from .points import Classes, Point

LONGEST = 120  # characters of a label


class Snapshot(Collector):
    """What prometheus-client takes for a registry: points of one moment."""

    def __init__(self, role: Role, points: Iterable[Point]) -> None:
        self.role = role
        self.points = points

    def collect(self) -> Iterator[Family]:
        return families(self.role, self.points)


def text(role: Role, points: Iterable[Point], accept: str = "") -> tuple[bytes, str]:
    """The answer, and its content type, for what an Accept header asks for."""
    try:
        encoder, kind = exposition.choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is no number
        encoder, kind = exposition.choose_encoder("")
    return encoder(Snapshot(role, points)), kind


def families(role: Role, points: Iterable[Point]) -> Iterator[Family]:
    """Each metric of the role, also those of which there is no value now."""
    by_name: dict[str, list[Point]] = {}
    for point in points:
        assert role in point.metric.roles, f"{point.metric.name} is none of a {role}"
        by_name.setdefault(point.metric.name, []).append(point)
    for metric in METRICS.values():
        if role in metric.roles:
            yield family(metric, by_name.get(metric.name, ()))


def family(metric: Metric, points: Sequence[Point]) -> Family:
    """One metric with its values; of several with the same labels, the first."""
    distinct: dict[tuple[str, ...], float | Classes] = {}
    for point in points:
        assert len(point.labels) == len(metric.labels), f"{metric.name} has the labels {metric.labels}"
        distinct.setdefault(tuple(map(readable, point.labels)), point.value)
    match metric.kind:
        case "counter":
            counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in distinct.items():
                counter.add_metric(labels, cast(float, value))
            return counter
        case "gauge":
            gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in distinct.items():
                gauge.add_metric(labels, cast(float, value))
            return gauge
        case "histogram":
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in distinct.items():
                counts, total = cast(Classes, value)
                histogram.add_metric(labels, buckets(metric, counts), total)
            return histogram
        case "info":
            info = InfoMetricFamily(metric.name.removesuffix("_info"), metric.help)
            for labels in distinct:
                info.add_metric([], dict(zip(metric.labels, labels, strict=True)))
            return info


def buckets(metric: Metric, counts: Sequence[int]) -> list[tuple[str, float]]:
    """Each bound with how many values are not above it."""
    counts = counts or [0] * (len(metric.bounds) + 1)
    ends = [*map(floatToGoString, metric.bounds), "+Inf"]
    return [(end, float(count)) for end, count in zip(ends, accumulate(counts), strict=True)]


def readable(label: str) -> str:
    """Half a pair of surrogates, as names of files have them, is no text."""
    return label[:LONGEST].encode("utf-8", "replace").decode()
