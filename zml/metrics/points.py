"""What a role shows, as plain values: one `Point` for each, made from a snapshot when somebody asks. No library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from .catalog import Metric, Role


class Classes(NamedTuple):
    """A histogram: how many values fell into each class of `Metric.bounds`, and above; and their sum."""

    counts: Sequence[int]
    sum: float


class Point(NamedTuple):
    """`labels` are the values of `metric.labels`, in their order."""

    metric: Metric
    labels: tuple[str, ...]
    value: float | Classes


class Target(msgspec.Struct, frozen=True):
    """One group of http_sd: here, of one process."""

    targets: list[str]
    labels: dict[str, str]


class Source(Protocol):
    """A role, as it is looked at."""

    @property
    def role(self) -> Role: ...

    async def points(self) -> Sequence[Point]:
        """What it shows now. Waits for nobody but, between two pieces of work, for its own loop."""
        ...

    def checks(self) -> Mapping[str, str]:
        """What it takes to do its part: for each, why it is not so, or nothing."""
        ...

    def targets(self) -> Sequence[Target] | None:
        """Who can be scraped; None where that is not this role's to say."""
        ...
