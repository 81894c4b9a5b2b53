"""What a dashboard is made of, and where its panels stand. It knows nothing of Grafana's JSON.

A panel has a number that is never given to another one: alerts and bookmarks point at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..metrics.catalog import METRICS, Metric
from .promql import Scope

ALL = Scope("$__rate_interval", {"job_id": '="$job"'})  # of the job that is looked at
SHOWN = Scope(
    ALL.window, {**ALL.matchers, "worker": '=~"$worker"', "shard": '=~"$shard"'}
)  # and those chosen
ALARM = 'ALERTS{alertname=~"Zml.+", alertstate="firing", job_id=~"${job:regex}|"}'
COLUMNS = 24

Kind = Literal["number", "lines", "stack", "heat", "table", "bars", "list"]
Colour = Literal["green", "red"]

# The end of a metric's name says its unit; Grafana's ids of units.
UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "ratio": "percentunit",
    "watts": "watt",
}
OVER_TIME = {"s": "percentunit", "bytes": "binBps"}  # of what grows by so much per second
COUNT = "short"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` names the series by its labels, {{worker}}; of a table it is the title of the column."""

    expr: str
    legend: str = ""
    rare: bool = False  # it shows only what is wrong: no series is good news

    @property
    def metrics(self) -> list[Metric]:
        return [METRICS[name] for name in names(self.expr)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    number: int
    title: str
    says: str  # what it shows, and what to make of it
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    unit: str = COUNT
    width: int = 8
    height: int = 8
    steps: tuple[tuple[float, Colour], ...] = ()  # from this value on, this colour
    least: float | None = None
    most: float | None = None
    key: str = ""  # of a table, the label that its columns share; of bars, that names a bar
    split: str = ""  # of bars, the label that divides one
    columns: tuple[tuple[str, str], ...] = ()  # of a table, units by title


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """`uid` is in its address, and does not change. `variables` are the viewer's choices."""

    uid: str
    title: str
    says: str
    rows: tuple[Row, ...]
    variables: tuple[str, ...] = ("job",)

    @property
    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels


@dataclass(frozen=True, slots=True)
class Place:
    x: int
    y: int
    w: int
    h: int


def names(expr: str) -> list[str]:
    """The metrics of the catalog that an expression asks for. Raises KeyError for one that is not there."""
    found: dict[str, None] = {}
    for series in re.findall(r"\bzml_[a-z0-9_]+", re.sub(r'"[^"]*"', '""', expr)):
        name = series
        if name not in METRICS:
            name = re.sub(r"_(bucket|sum|count)$", "", series)
            if name not in METRICS or METRICS[name].kind != "histogram":
                raise KeyError(series)
        found[name] = None
    return list(found)


def unit(metric: Metric, *, rate: bool = False) -> str:
    """The unit of a metric, or of its growth per second."""
    end = metric.name.removesuffix("_total").removesuffix("_timestamp_seconds").rsplit("_", 1)[-1]
    own = UNITS.get(end, COUNT)
    return OVER_TIME.get(own, own) if rate else own


def places(dashboard: Dashboard) -> Iterator[tuple[Row, Place, list[tuple[Panel, Place]]]]:
    """Where everything stands: each row below its title, from left to right, in lines of 24 columns."""
    y = 0
    for row in dashboard.rows:
        title = Place(0, y, COLUMNS, 1)
        y += 1
        x, tallest = 0, 0
        stand: list[tuple[Panel, Place]] = []
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            stand.append((panel, Place(x, y, panel.width, panel.height)))
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest
        yield row, title, stand
