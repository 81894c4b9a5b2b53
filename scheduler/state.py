"""The whole state of a job, the tables by which it moves, and what must hold after every event.

    FORMING -> RUNNING -> (DRAINING ->) FINISHING -> SUCCEEDED | FAILED | CANCELLED

Whatever moves a job is a `Cause`; where a state has no entry for a cause, the machine must not have raised it.
FINISHING keeps the cause that led to it: the members have their orders to stop, and when the last of them is gone, or
has had its time, the job ends as OUTCOME says.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import ClassVar, TypeAlias

from .homes import Backup, Copying, Home, copy_at, is_misplaced
from .ids import JobId, MemberId, ShardId, WorkerId, shard_id
from .membership import Alive, Gone, Members


class State(Enum):
    """Where a job is in its life."""

    FORMING = auto()
    RUNNING = auto()
    DRAINING = auto()
    FINISHING = auto()
    SUCCEEDED = auto()
    FAILED = auto()
    CANCELLED = auto()

    @property
    def over(self) -> bool:
        return self in OUTCOME.values()


class Cause(Enum):
    """What moves a job, in words."""

    COMPLETE = "everybody asked for is here"
    DRAIN_ASKED = "a drain was asked for"
    CANCEL_ASKED = "an end was asked for"
    SCRIPT_FAILED = "a script failed"
    LAYOUT_REFUSED = "a layout is not acceptable"
    SHARD_LOST = "a shard does not come back"
    WORKERS_DONE = "workers gone, some finished"
    WORKERS_DRAINED = "workers gone, in order"
    WORKERS_LOST = "workers gone, and nobody came back"


NEXT: dict[State, dict[Cause, State]] = {
    State.FORMING: {
        Cause.COMPLETE: State.RUNNING,
        Cause.CANCEL_ASKED: State.FINISHING,
        Cause.SCRIPT_FAILED: State.FINISHING,
        Cause.WORKERS_DONE: State.FINISHING,
        Cause.WORKERS_LOST: State.FINISHING,
    },
    State.RUNNING: {
        Cause.DRAIN_ASKED: State.DRAINING,
        Cause.CANCEL_ASKED: State.FINISHING,
        Cause.SCRIPT_FAILED: State.FINISHING,
        Cause.LAYOUT_REFUSED: State.FINISHING,
        Cause.SHARD_LOST: State.FINISHING,
        Cause.WORKERS_DONE: State.FINISHING,
        Cause.WORKERS_DRAINED: State.FINISHING,
        Cause.WORKERS_LOST: State.FINISHING,
    },
    State.DRAINING: {
        Cause.CANCEL_ASKED: State.FINISHING,
        Cause.SCRIPT_FAILED: State.FINISHING,
        Cause.LAYOUT_REFUSED: State.FINISHING,
        Cause.SHARD_LOST: State.FINISHING,
        Cause.WORKERS_DRAINED: State.FINISHING,
        Cause.WORKERS_LOST: State.FINISHING,
    },
}

OUTCOME: dict[Cause, State] = {
    Cause.WORKERS_DONE: State.SUCCEEDED,
    Cause.WORKERS_DRAINED: State.CANCELLED,
    Cause.CANCEL_ASKED: State.CANCELLED,
    Cause.SCRIPT_FAILED: State.FAILED,
    Cause.LAYOUT_REFUSED: State.FAILED,
    Cause.SHARD_LOST: State.FAILED,
    Cause.WORKERS_LOST: State.FAILED,
}


# -- where the parameters are: a life within RUNNING and DRAINING ------------------------------------------


@dataclass(frozen=True, slots=True)
class Unknown:
    """No script has shown its layout yet."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the parameters look like, and whose script showed it first."""

    digest: str
    chunks: int
    shown_by: WorkerId


@dataclass(frozen=True, slots=True)
class Loading:
    """Every shard knows its chunks; the initialiser, the most senior worker, is to bring their first values."""

    layout: Layout
    initialiser: WorkerId
    incarnation: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The shards hold parameters."""

    layout: Layout


Parameters: TypeAlias = Unknown | Loading | Ready


# -- the phases of a job, each with what belongs to it ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forming:
    """Members come; scripts load, and wait until all are here. It has no deadline."""

    state: ClassVar[State] = State.FORMING


@dataclass(frozen=True, slots=True)
class Running:
    """The scripts compute; or there is no worker for now, and one that was lost may come back."""

    state: ClassVar[State] = State.RUNNING
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Draining:
    """No batches are given out; the scripts finish their step, save and leave."""

    state: ClassVar[State] = State.DRAINING
    parameters: Parameters
    because: str


@dataclass(frozen=True, slots=True)
class Finishing:
    """Everybody was told to stop. `until` is when the job is over without those who have not."""

    state: ClassVar[State] = State.FINISHING
    cause: Cause
    exit_code: int
    because: str
    until: float


Phase: TypeAlias = Forming | Running | Draining | Finishing


@dataclass(slots=True)
class Job:
    """A job that is not over."""

    id: JobId
    workers: int  # asked for
    shards: int  # asked for, and those that have joined since
    staleness: int | None
    resumed: bool = False  # its first parameters are in a checkpoint, not with a worker
    phase: Phase = field(default_factory=Forming)
    members: Members = field(default_factory=Members)
    generation: int = 0  # 0 while FORMING, then + 1 at each change of the active workers
    # Shards whose chunks nobody serves: gone, or back and still reading; until when they are waited for.
    away: dict[ShardId, float] = field(default_factory=dict)
    replicas: int = 0  # backups of each shard: none or one
    homes: dict[ShardId, Home] = field(default_factory=dict)  # of every shard, from the job's beginning on
    promoting: dict[ShardId, Home] = field(default_factory=dict)  # where a backup is to begin to serve
    backups: dict[ShardId, Backup] = field(default_factory=dict)  # the shards whose backup is up to date
    given_up: dict[ShardId, int] = field(default_factory=dict)  # the newest copy of its home that is not
    # Processes that are not on the ring: leaving, or gone for good.
    off: set[ShardId] = field(default_factory=set)
    # What serving shards were told of their copies, and how often.
    copying: dict[ShardId, Copying] = field(default_factory=dict)
    copyings: dict[ShardId, int] = field(default_factory=dict)
    # Who could not read the log of a shard's home.
    refused: dict[ShardId, set[ShardId]] = field(default_factory=dict)

    @property
    def state(self) -> State:
        return self.phase.state

    @property
    def under_way(self) -> bool:
        """It has begun, and nobody was told to stop."""
        return isinstance(self.phase, Running | Draining)

    @property
    def missing_workers(self) -> int:
        """Before it begins; whoever has come to its end already is not waited for."""
        ended = sum(gone.is_final for _, gone in self.members.gone("worker"))
        return max(0, self.workers - len(self.members.alive("worker")) - ended)

    @property
    def missing_shards(self) -> list[MemberId]:
        here = self.members.alive("shard")
        return [shard_id(number) for number in range(self.shards) if shard_id(number) not in here]

    def is_misplaced(self, shard: ShardId) -> bool:
        """Does it live where it does not belong?"""
        return is_misplaced(shard, self.homes[shard].host, self.shards, self.replicas, self.off)

    def place_of_copy(self, shard: ShardId) -> ShardId | None:
        """The process that is to have its copy, if it is to have one and such a process is here."""
        if not (self.replicas or self.is_misplaced(shard)):
            return None
        here = self.members.alive("shard")
        return copy_at(shard, self.homes[shard].host, self.shards, self.replicas, self.off, here)

    def next_copying(self, shard: ShardId) -> int:
        """The number of the next word to a shard on its copy."""
        number = self.copyings[shard] = self.copyings.get(shard, 0) + 1
        return number

    def check(self) -> None:
        """Every invariant of a job between two events."""
        self.members.check()
        alive = {**self.members.alive("worker"), **self.members.alive("shard")}
        workers = self.members.workers()
        complete = not self.missing_workers and not self.missing_shards
        match self.phase:
            case Forming():
                assert self.generation == 0 and not complete, "everybody is here, and it does not run"
                assert not any(record.founder for record in alive.values())
            case Running() | Draining():
                assert self.generation >= 1
                lost = any(gone.back_by is not None for _, gone in self.members.gone("worker"))
                may_wait = lost and isinstance(self.phase, Running)
                assert workers or may_wait, "it runs without a worker, and none may come back"
                self._check_homes()
                self._check_seniority(workers)
                if workers and isinstance(loading := self.phase.parameters, Loading):
                    record = alive[loading.initialiser]
                    assert loading.initialiser == workers[0], f"{workers[0]} is senior to the initialiser"
                    assert loading.incarnation == record.incarnation, "a former incarnation is to initialise"
            case Finishing():
                assert alive, "everybody is gone, and the job is not over"
                assert self.phase.cause in OUTCOME
        shards = {shard_id(number) for number in range(self.shards)}
        assert self.members.alive("shard").keys() <= shards, "a shard without a place"

    def _check_homes(self) -> None:
        alive = self.members.alive("shard")
        assert len(self.homes) == self.shards
        for shard, home in self.homes.items():
            assert home.host in alive or shard in self.away, f"{shard} lives nowhere, and nobody knows"
        for shard, home in self.promoting.items():
            assert shard in self.away and home.host in alive, f"{shard} is promoted where nobody is"
            assert home.incarnation > self.homes[shard].incarnation
        for shard, backup in self.backups.items():
            here = self.homes[shard].host
            assert self.replicas and shard not in self.away and backup.host != here
            assert alive[backup.host].incarnation == backup.host_incarnation, "a backup outlived its process"
            assert backup.copy > self.given_up.get(shard, 0)
        for shard, copying in self.copying.items():
            assert copying.host != self.homes[shard].host, f"{shard} is to be copied to where it lives"
            assert alive[copying.host].incarnation == copying.host_incarnation, (
                "a copy in a process that is gone"
            )
            assert copying.number <= self.copyings[shard]

    def _check_seniority(self, workers: list[WorkerId]) -> None:
        seats = self.members.seats()
        founders = [int(seat.worker[1:]) for seat in seats if seat.founder]
        assert founders == sorted(founders), f"founders out of order: {workers}"
        assert all(seat.founder for seat in seats[: len(founders)]), (
            f"a founder is junior to a latecomer: {seats}"
        )


@dataclass(frozen=True, slots=True)
class Over:
    """What is kept of a job that is over."""

    id: JobId
    state: State
    cause: Cause
    exit_code: int
    because: str
    generation: int
    members: dict[MemberId, Gone]

    def check(self) -> None:
        assert self.state.over and OUTCOME[self.cause] is self.state, self.state
        assert not any(isinstance(record, Alive) for record in self.members.values())


@dataclass(frozen=True, slots=True)
class Return:
    """A job without workers waits for one to come back, or ends so."""

    by: float
    cause: Cause
    exit_code: int


@dataclass(slots=True)
class Kept:
    """What a machine is, without the leases."""

    jobs: dict[JobId, Job]
    over: dict[JobId, Over]
    goodbyes: dict[JobId, float]
    returns: dict[JobId, Return]
