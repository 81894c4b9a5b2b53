"""PromQL from entries of the catalog: a query cannot name what is not measured, nor a label that a metric lacks.

A scope says which series are meant and over how long a rate is taken. There are two: a dashboard's, by the variables
that its viewer sets, and an alert rule's, of everything over some minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..metrics.catalog import Metric

OPERATOR = re.compile(r" (?:[-+*/]|and|unless|or|[<>]=?|==|!=) ")
BRACKETS = {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}
# What the scrape adds to each series, beside the metric's own labels; "job" is the name of the scrape configuration.
OF_TARGETS = frozenset({"job", "instance", "job_id", "role", "member", "node"})


@dataclass(frozen=True, slots=True)
class Scope:
    """`window` is what a rate is taken over; `matchers` are for the metrics that have their label."""

    window: str
    matchers: Mapping[str, str] = field(default_factory=dict)  # `worker` -> `=~"$worker"`

    def of(self, metric: Metric, suffix: str = "", **only: str) -> str:
        """The series themselves. `only` narrows: role="worker", phase="!~push|pull"."""
        known = OF_TARGETS | set(metric.labels)
        assert only.keys() <= known, f"{metric.name} has no label {sorted(only.keys() - known)}"
        matchers = {
            label: how for label, how in self.matchers.items() if label in known and label not in only
        }
        if "hub" in metric.roles and "job_id" not in metric.labels:
            # A coordinator of many jobs is itself of no job. What it counts is shown beside the job that is looked at.
            matchers.pop("job_id", None)
            if "job_id" in self.matchers and len(metric.roles) > 1:
                matchers["job_id"] = '=~"${job:regex}|"'
        matchers |= {label: _matcher(how) for label, how in only.items()}
        inside = ", ".join(f"{label}{how}" for label, how in matchers.items())
        return f"{metric.name}{suffix}" + (f"{{{inside}}}" if inside else "")

    def rate(self, metric: Metric, by: Sequence[str] = (), suffix: str = "", **only: str) -> str:
        """Growth of a counter per second."""
        assert metric.kind in ("counter", "histogram"), f"{metric.name} is a {metric.kind}"
        return together("sum", f"rate({self.of(metric, suffix, **only)}[{self.window}])", by)

    def increase(self, metric: Metric, by: Sequence[str] = (), suffix: str = "", **only: str) -> str:
        """Growth of a counter over the window."""
        assert metric.kind in ("counter", "histogram"), f"{metric.name} is a {metric.kind}"
        return together("sum", f"increase({self.of(metric, suffix, **only)}[{self.window}])", by)

    def quantile(self, share: float, metric: Metric, by: Sequence[str] = (), **only: str) -> str:
        """Of a histogram, interpolated within its classes."""
        assert metric.kind == "histogram", f"{metric.name} is a {metric.kind}"
        return f"histogram_quantile({share:g}, {self.rate(metric, (*by, 'le'), '_bucket', **only)})"

    def mean(self, metric: Metric, by: Sequence[str] = (), **only: str) -> str:
        """Of a histogram, exact."""
        return f"{self.rate(metric, by, '_sum', **only)} / {self.rate(metric, by, '_count', **only)}"

    def sum(self, metric: Metric, by: Sequence[str] = (), **only: str) -> str:
        return together("sum", self.of(metric, **only), by)

    def max(self, metric: Metric, by: Sequence[str] = (), **only: str) -> str:
        """Of gauges that several processes may tell: a coordinator and the one that follows it."""
        return together("max", self.of(metric, **only), by)


def together(how: str, expr: str, by: Sequence[str] = ()) -> str:
    """Many series as one, or as one for each value of `by`: sum by (worker) (...)."""
    return f"{how} by ({', '.join(by)}) ({expr})" if by else f"{how}({expr})"


def _matcher(how: str) -> str:
    """`active` -> `="active"`, `!~push|pull` -> `!~"push|pull"`."""
    for operator in ("=~", "!~", "!="):
        if how.startswith(operator):
            return f'{operator}"{how.removeprefix(operator)}"'
    return f'="{how}"'


def readable(expr: str, width: int = 100) -> str:
    """The same expression in lines: broken before the operators that join its parts, and within long brackets."""
    if len(expr) <= width:
        return expr
    lines: list[str] = []
    for part in _parts(expr):
        if lines and len(lines[-1]) + 1 + len(part) <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return "\n".join(_opened(line, width) for line in lines)


def _parts(expr: str) -> list[str]:
    """What stands at the top, each part with the operator before it or the comma behind it."""
    cuts = [
        place
        for place, depth in _depths(expr)
        if depth == 0 and (OPERATOR.match(expr, place) or expr[place - 1] == ",")
    ]
    return [expr[start:end].strip() for start, end in zip([0, *cuts], [*cuts, len(expr)], strict=True)]


def _opened(line: str, width: int) -> str:
    """A line that is too long, with what is in its longest brackets in lines of its own."""
    if len(line) <= width:
        return line
    ends: list[tuple[int, int]] = []
    start = 0
    for place, depth in _depths(line):
        if depth == 0 and line[place] == ")":
            ends.append((start, place))
        elif depth == 1 and line[place] == "(":
            start = place
    start, end = max(ends, key=lambda found: found[1] - found[0], default=(0, 0))
    if end - start < 2:
        return line
    inside = readable(line[start + 1 : end], width - 2).replace("\n", "\n  ")
    return f"{line[: start + 1]}\n  {inside}\n{line[end:]}"


def _depths(expr: str) -> Iterator[tuple[int, int]]:
    """Each place, and in how many brackets it is; what stands in quotes is passed over."""
    depth, quoted = 0, False
    for place, letter in enumerate(expr):
        quoted ^= letter == '"'
        if not quoted:
            depth += BRACKETS.get(letter, 0)
            yield place, depth
