"""The whole state of a cluster: jobs with their attempts, nodes, and what must hold after every event.

    QUEUED -> STARTING -> RUNNING -> (DRAINING ->) QUEUED | PAUSED | SUCCEEDED | FAILED | CANCELLED | TIMED_OUT

A job is a row of attempts. An attempt has everything it needs for as long as it lives, and is one life of a job in the
sense of `scheduler.machine`; the next one begins with the newest checkpoint of those before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from math import inf

from ..ids import JobId
from .events import Outcome
from .plan import Allocation
from .request import Request
from .resources import Node, NodeId, Resources


class Standing(Enum):
    """Where a job stands, for people. The last four are ends."""

    QUEUED = auto()
    PAUSED = auto()
    STARTING = auto()
    RUNNING = auto()
    DRAINING = auto()
    SUCCEEDED = auto()
    FAILED = auto()
    CANCELLED = auto()
    TIMED_OUT = auto()

    @property
    def over(self) -> bool:
        return self.value >= Standing.SUCCEEDED.value


class Then(Enum):
    """What becomes of a job when its attempt, which is on its way out, is over."""

    REQUEUE = "it waits for its turn"
    TRY_AGAIN = "it is tried again"
    PAUSE = "it is paused"
    CANCEL = "it is over"
    TIME_UP = "its time is over"


@dataclass(slots=True)
class Slot:
    """A place for a process on a node: taken until the node says that the process is gone."""

    node: NodeId
    leaving: bool = False
    until: float = inf  # then a process that was to leave is killed


@dataclass(slots=True)
class Leaving:
    """Why an attempt is on its way out, and what comes then. `until` is when patience ends; then it is stopped."""

    then: Then
    because: str
    until: float
    stopped: bool = False


@dataclass(slots=True)
class Attempt:
    """One life of a job on nodes. `began` is None until everybody has come."""

    number: int
    placed: float
    slots: dict[str, Slot]
    asked: int  # workers that it begins with
    next_worker: int
    began: float | None = None
    finishing: bool = False  # a script has come to its end, and others will
    leaving: Leaving | None = None
    outcome: Outcome | None = None  # once its coordinator says that it is over
    exit_code: int = 0
    because: str = ""
    ended: float = 0.0  # when that was
    kill_at: float = inf  # then what is still there is killed

    def workers(self, *, all_of_them: bool = False) -> list[str]:
        """Those that are to stay, in order of their numbers."""
        stay = (name for name, slot in self.slots.items() if all_of_them or not slot.leaving)
        return sorted((name for name in stay if name[0] == "w"), key=number_of)

    def shards(self) -> list[str]:
        return sorted((slot for slot in self.slots if slot[0] == "p"), key=number_of)

    def allocation(self, *, all_of_it: bool = False) -> Allocation:
        """Without those that are leaving."""
        return Allocation(
            tuple(self.slots[slot].node for slot in self.workers(all_of_them=all_of_it)),
            tuple(self.slots[slot].node for slot in self.shards()),
        )


def number_of(slot: str) -> int:
    return int(slot[1:])


@dataclass(slots=True)
class Job:
    """A job that is not over."""

    request: Request
    since: float  # since when it has had what it has, or has waited
    attempts: int = 0  # begun so far
    attempt: Attempt | None = None
    paused: str = ""  # why, where it is
    not_before: float = 0.0  # after a failure
    failures: int = 0  # of its script
    losses: int = 0  # attempts in a row that machines ended, soon
    false_starts: int = 0  # attempts in a row that did not begin
    changes: int = 0  # of its allocation
    attained_s: float = 0.0  # worker-seconds until `counted`
    ran_s: float = 0.0  # from the beginnings of its attempts to their ends, without the present one
    counted: float = 0.0
    first_began: float | None = None

    @property
    def id(self) -> JobId:
        return self.request.job

    @property
    def standing(self) -> Standing:
        if self.attempt is None:
            return Standing.PAUSED if self.paused else Standing.QUEUED
        attempt = self.attempt
        if attempt.leaving is not None or attempt.outcome is not None or attempt.finishing:
            return Standing.DRAINING
        return Standing.STARTING if self.attempt.began is None else Standing.RUNNING

    def attained(self, now: float) -> float:
        """Worker-seconds until now."""
        workers = len(self.attempt.workers()) if self.attempt is not None else 0
        return self.attained_s + workers * (now - self.counted)

    def count(self, now: float) -> None:
        """Before the number of workers changes."""
        self.attained_s, self.counted = self.attained(now), now

    def takes(self, slot: str) -> Resources:
        return self.request.worker if slot[0] == "w" else self.request.shard


@dataclass(slots=True)
class Present:
    """A node that is here."""

    node: Node
    boot: str


@dataclass(frozen=True, slots=True)
class Over:
    """What is kept of a job that is over."""

    request: Request
    standing: Standing
    exit_code: int
    because: str
    at: float
    attempts: int
    attained_s: float
    first_began: float | None


@dataclass(slots=True)
class Cluster:
    """Everything: what a snapshot holds."""

    jobs: dict[JobId, Job] = field(default_factory=dict)  # not over, in order of submission
    over: dict[JobId, Over] = field(default_factory=dict)  # the latest, the oldest first
    nodes: dict[NodeId, Present] = field(default_factory=dict)

    def taken(self) -> dict[NodeId, Resources]:
        """What processes take of each node, those on their way out too."""
        sums = {node: [0, 0, 0] for node in self.nodes}
        for job in self.jobs.values():
            if job.attempt is not None:
                for name, slot in job.attempt.slots.items():
                    amount, at = job.takes(name), sums[slot.node]
                    at[0] += amount.cpus
                    at[1] += amount.gpus
                    at[2] += amount.memory_mb
        return {node: Resources(cpus=c, gpus=g, memory_mb=m) for node, (c, g, m) in sums.items()}

    def check(self) -> None:
        """Every invariant between two events."""
        for node, taken in self.taken().items():
            offers = self.nodes[node].node.offers
            assert offers.holds(taken), f"{node} offers {offers}, and {taken} of it is taken"
        for name, job in self.jobs.items():
            assert name == job.id and name not in self.over
            if (attempt := job.attempt) is None:
                continue
            assert attempt.number == job.attempts and not job.paused
            assert all(slot.node in self.nodes for slot in attempt.slots.values()), "a slot on no node"
            assert attempt.slots or attempt.outcome is None, f"{name}: nothing is left, and it is not closed"
            assert all(number_of(slot) < attempt.next_worker for slot in attempt.workers())
            assert all(slot.leaving or slot.until == inf for slot in attempt.slots.values())
        for over in self.over.values():
            assert over.standing.over
