"""What somebody wants to run. A request never changes but by `zml job scale`, which replaces it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..ids import JobId
from .resources import NOTHING, Resources

MOST_WORKERS = 10_000
MOST_SHARDS = 1_000
ONE_CPU = Resources(cpus=1)

Kind: TypeAlias = tuple[object, ...]
"""Requests of one kind find room together or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A job as it was asked for. It begins with `least` workers and all its shards or not at all (gang), and may
    have up to `most` workers. Times are seconds, of the clock that the machine is told. Raises ValueError."""

    job: JobId
    user: str = ""
    least: int = 1
    most: int = 1
    shards: int = 1
    replicas: int = 0
    worker: Resources = ONE_CPU
    """What each worker takes."""
    shard: Resources = NOTHING
    """What each shard takes: its memory is what keeps many jobs' shards on one node apart."""
    priority: int = 0
    """A job of higher priority goes first, whatever else the policy looks at."""
    after: tuple[JobId, ...] = ()
    """It begins when all these have succeeded, and never when one of them has ended otherwise."""
    retries: int = 0
    time_limit_s: float | None = None
    """Of running, all attempts together."""
    preemptible: bool = True
    """It may be drained for others, and go on from its checkpoint when its turn comes again."""
    submitted: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= MOST_WORKERS:
            raise ValueError(f"workers must be 1 to {MOST_WORKERS:,}, not {self.least}..{self.most}")
        if not 1 <= self.shards <= MOST_SHARDS:
            raise ValueError(f"shards must be 1 to {MOST_SHARDS:,}, not {self.shards}")
        if not 0 <= self.replicas <= min(1, self.shards - 1):
            raise ValueError(f"replicas must be 0, or 1 with 2 shards or more, not {self.replicas}")
        if self.retries < 0:
            raise ValueError(f"retries must not be negative, not {self.retries}")
        if self.time_limit_s is not None and self.time_limit_s <= 0:
            raise ValueError(f"the time limit must be above 0, not {self.time_limit_s:g} s")
        if self.job in self.after:
            raise ValueError(f"{self.job} cannot begin after itself")


def kind_of(request: Request) -> Kind:
    return (
        request.worker,
        request.least,
        request.shard,
        request.shards,
        request.replicas,
        request.preemptible,
    )
