"""What a policy is shown, and what it answers: the whole picture in both directions, and no order to anybody.

A policy is a plain function of the view. It says for every job what it should have from now on, or why it has nothing;
what it has now and should keep is the same allocation again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Protocol

from ..ids import JobId
from .request import Request
from .resources import Node, NodeId, Resources


@dataclass(frozen=True, slots=True)
class Allocation:
    """Where a job's processes are: worker i on `workers[i]`, shard k on `shards[k]`. The order of workers means
    nothing; a job that shrinks or grows keeps its shards where they are."""

    workers: tuple[NodeId, ...]
    shards: tuple[NodeId, ...]

    def on(self, node: NodeId, request: Request) -> Resources:
        """What it takes of this node."""
        return request.worker * self.workers.count(node) + request.shard * self.shards.count(node)

    @property
    def nodes(self) -> set[NodeId]:
        return {*self.workers, *self.shards}


class Profile(Protocol):
    """What is known of how fast a job learns."""

    def goodput(self, workers: int, nodes: int) -> float:
        """Useful samples a second, with so many workers on so many nodes (Pollux, OSDI 2021, eq. 6)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A job that is not over, as the policy sees it."""

    request: Request
    allocation: Allocation | None = None
    """What it has; None while it waits."""
    since: float = 0.0
    """Since when it has had that, or has waited."""
    attained_s: float = 0.0
    """Worker-seconds that it has had, all attempts together, until now."""
    ran_s: float = 0.0
    """Seconds that it has run, all attempts together, with however many workers."""
    changes: int = 0
    """How often its allocation has changed since it began."""
    runnable: bool = True
    """False: it is paused, or jobs that it comes after are not over, or it has to wait after a failure."""
    draining: bool = False
    """It is on its way out of what it has, which is not free before it is gone."""
    ending: bool = False
    """A script of it has come to its end, and others go on: it gets nothing more or other than it has, and may be
    drained."""
    profile: Profile | None = None
    left_s: float | None = None
    """How much longer it would run with what it asks for, where somebody knows: a simulator does."""

    @property
    def may_run_s(self) -> float:
        """How much longer its time limit lets it run."""
        limit = self.request.time_limit_s
        return inf if limit is None else max(limit - self.ran_s, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most that one user's jobs may hold together, each until it is gone; None: as much as there is."""

    gpus: int | None = None
    cpus: int | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The cluster at one moment. Draining jobs and those that keep running are in `jobs` with what they hold."""

    now: float
    nodes: tuple[Node, ...]
    jobs: tuple[Candidate, ...]
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    change_s: float = 30.0
    """How long a job stands still when its workers change: half a minute where it begins anew from a checkpoint."""
    held: Mapping[str, Resources] = field(default_factory=dict)
    """What users hold beside what `jobs` say: processes that are on their way out while their jobs go on, and jobs that
    are not shown, for nothing is to be decided about them now."""
    held_workers: Mapping[str, int] = field(default_factory=dict)
    """And how many of these processes are workers."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Weight of each user where the policy shares fairly; 1 for whoever is not named."""


class Why(Enum):
    """Why a job has what it has, or nothing: for `zml explain JOB`."""

    RUNS = "it runs"
    STARTS = "it begins now"
    GROWS = "it gets more workers"
    SHRINKS = "it gives workers to others"
    PREEMPTED = "others go first: it is drained and goes on later"
    NO_ROOM = "what it needs is not free"
    BEHIND = "others go first"
    TOO_BIG = "no set of the nodes that are here has what it needs"
    QUOTA = "its user holds as much as the quota allows"
    AFTER = "it comes after jobs that are not over"
    PAUSED = "it was paused"
    BACKING_OFF = "it failed, and waits before it is tried again"
    DRAINING = "it leaves the nodes it has"
    UNDECIDED = "no round has looked at it yet"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one job should have from now on: None, and it has to wait. `because` is a sentence with the numbers."""

    allocation: Allocation | None
    why: Why
    because: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The policy's answer. Every job of the view has a verdict, and all allocations together fit on the nodes."""

    verdicts: Mapping[JobId, Verdict]


class Policy(Protocol):
    """Who gets what. It changes nothing and remembers nothing."""

    def __call__(self, view: View) -> Plan: ...
