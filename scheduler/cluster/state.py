"""The whole state of a cluster: jobs with their attempts, nodes, and what must hold after every event.

    QUEUED -> STARTING -> RUNNING -> (DRAINING ->) QUEUED | PAUSED | SUCCEEDED | FAILED | CANCELLED | TIMED_OUT

A job is a row of attempts. An attempt has everything it needs for as long as it lives, and is one life of a job in the
sense of `scheduler.machine`; the next one begins with the newest checkpoint of those before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache
from math import inf

from ..ids import JobId
from .events import Outcome
from .plan import Allocation
from .request import Request
from .resources import Node, NodeId, Resources, Sums
from .rules import Rules


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
    finishing: bool = False  # a script has come to its end, and others will: it gets no more workers
    finishing_until: float = 0.0  # so long it is as good as gone; inf: it was, and runs like any other
    stopping: bool = False  # a shard of it has come to its end, as it is told when the job is over
    leaving: Leaving | None = None
    outcome: Outcome | None = None  # once its coordinator says that it is over
    exit_code: int = 0
    because: str = ""
    ended: float = 0.0  # when that was
    kill_at: float = inf  # then what is still there is killed

    @property
    def on_its_way_out(self) -> bool:
        return not self.is_to_go_on or (self.finishing and self.finishing_until < inf)

    @property
    def is_to_go_on(self) -> bool:
        """Until all scripts have come to their end: nobody has told it to leave, and it is not over."""
        return self.leaving is None and self.outcome is None

    @property
    def needs_shards(self) -> bool:
        """One that is lost is to be placed again: somebody computes, and nobody has told the shards that it is over."""
        computes = self.began is not None and any(name[0] == "w" for name in self.slots)
        return computes and self.is_to_go_on and not self.stopping

    def workers(self, *, all_of_them: bool = False) -> list[str]:
        """Those that are to stay, in order of their numbers: they come with rising ones, and `slots` keeps that."""
        return [
            name for name, slot in self.slots.items() if name[0] == "w" and (all_of_them or not slot.leaving)
        ]

    def shards(self) -> list[str]:
        """In order of their numbers: one that was lost comes again behind those that were not."""
        found = [slot for slot in self.slots if slot[0] == "p"]
        return found if len(found) < 2 else sorted(found, key=number_of)

    def allocation(self, *, all_of_it: bool = False) -> Allocation:
        """Without those that are leaving."""
        return Allocation(
            tuple(self.slots[slot].node for slot in self.workers(all_of_them=all_of_it)),
            tuple(self.slots[slot].node for slot in self.shards()),
        )


def number_of(slot: str) -> int:
    return int(slot[1:])


@cache
def shard_names(count: int) -> tuple[str, ...]:
    return tuple(f"p{number}" for number in range(count))


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
    def is_short(self) -> bool:
        """It runs, and a shard of it is nowhere: nothing else is decided about it before that is."""
        attempt = self.attempt
        return attempt is not None and any(
            name not in attempt.slots for name in shard_names(self.request.shards)
        )

    @property
    def is_restless(self) -> bool:
        """It does not simply run: it waits, is on its way out, or lacks a shard."""
        return self.attempt is None or self.attempt.leaving is not None or self.is_short

    @property
    def standing(self) -> Standing:
        if self.attempt is None:
            return Standing.PAUSED if self.paused else Standing.QUEUED
        if self.attempt.on_its_way_out:
            return Standing.DRAINING
        return Standing.STARTING if self.attempt.began is None else Standing.RUNNING

    def attained(self, now: float) -> float:
        """Worker-seconds until now."""
        workers = len(self.attempt.workers()) if self.attempt is not None else 0
        return self.attained_s + workers * (now - self.counted)

    def ran(self, now: float) -> float:
        """Seconds that it has run until now: those are what its time limit is about, with however many workers."""
        attempt = self.attempt
        if attempt is None or attempt.began is None:
            return self.ran_s
        return self.ran_s + ((attempt.ended if attempt.outcome is not None else now) - attempt.began)

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
    rules: Rules | None = None  # that are kept; None: nobody has written down which
    restless: set[JobId] = field(init=False, repr=False, compare=False)  # of `jobs`; few of thousands
    _taken: Sums[NodeId] = field(init=False, repr=False, compare=False)  # what `jobs` add up to

    def __post_init__(self) -> None:
        self._taken = self._counted()
        self.restless = {name for name, job in self.jobs.items() if job.is_restless}

    def review(self, name: JobId) -> None:
        """Something has happened to this job."""
        job = self.jobs.get(name)
        if job is not None and job.is_restless:
            self.restless.add(name)
        else:
            self.restless.discard(name)

    def _counted(self) -> Sums[NodeId]:
        found: Sums[NodeId] = Sums()
        for job in self.jobs.values():
            for name, slot in job.attempt.slots.items() if job.attempt is not None else ():
                found.add(slot.node, job.takes(name))
        return found

    def put(self, job: Job, attempt: Attempt, name: str, node: NodeId) -> None:
        """A process of the attempt gets a place there."""
        assert name not in attempt.slots
        attempt.slots[name] = Slot(node)
        self._taken.add(node, job.takes(name))

    def lift(self, job: Job, attempt: Attempt, name: str) -> Slot:
        """The process is gone: its place is free."""
        slot = attempt.slots.pop(name)
        self._taken.add(slot.node, job.takes(name), -1)
        self.review(job.id)  # of a job that is over nobody is told
        return slot

    def remove(self, node: NodeId) -> None:
        """Nothing is there any more."""
        del self.nodes[node]
        self._taken.drop(node)

    def taken(self) -> dict[NodeId, Resources]:
        """What processes take of each node, those on their way out too."""
        return {node: self._taken[node] for node in self.nodes}

    def free(self) -> dict[NodeId, Resources]:
        """Below zero where a node offers less than it did."""
        return {name: present.node.offers - self._taken[name] for name, present in self.nodes.items()}

    def check(self) -> None:
        """Every invariant between two events."""
        counted = self._counted()
        for node, taken in self.taken().items():
            assert taken == counted[node], f"{counted[node]} of {node} is taken, and {taken} is known"
            offers = self.nodes[node].node.offers
            assert offers.holds(taken), f"{node} offers {offers}, and {taken} of it is taken"
        assert self.restless == {name for name, job in self.jobs.items() if job.is_restless}
        for name, job in self.jobs.items():
            assert name == job.id and name not in self.over
            if (attempt := job.attempt) is None:
                continue
            assert attempt.number == job.attempts and not job.paused
            assert all(slot.node in self.nodes for slot in attempt.slots.values()), "a slot on no node"
            assert attempt.slots or attempt.outcome is None, f"{name}: nothing is left, and it is not closed"
            numbers = [number_of(slot) for slot in attempt.workers(all_of_them=True)]
            assert numbers == sorted(numbers) and all(number < attempt.next_worker for number in numbers)
            assert all(slot.leaving or slot.until == inf for slot in attempt.slots.values())
        for over in self.over.values():
            assert over.standing.over
