"""What to do about jobs and nodes: the cluster machine's only output. Twice is the same as once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..ids import JobId
from .events import Outcome
from .resources import NodeId
from .state import Standing


@dataclass(frozen=True, slots=True)
class Open:
    """Make the attempt's own coordinator, which is to wait for so many workers and the job's shards."""

    job: JobId
    attempt: int
    workers: int
    because: str


@dataclass(frozen=True, slots=True)
class Run:
    """Let this node start this worker or shard."""

    job: JobId
    attempt: int
    slot: str
    node: NodeId
    because: str


@dataclass(frozen=True, slots=True)
class Quit:
    """Let this node end this process: in order, or at once."""

    job: JobId
    attempt: int
    slot: str
    node: NodeId
    at_once: bool
    because: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Tell the attempt's coordinator: finish the step, save, end."""

    job: JobId
    attempt: int
    because: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Tell the attempt's coordinator: end now."""

    job: JobId
    attempt: int
    because: str


@dataclass(frozen=True, slots=True)
class Bury:
    """Tell the attempt's coordinator that the process of this member is gone: it need not wait for its lease."""

    job: JobId
    attempt: int
    slot: str
    because: str


@dataclass(frozen=True, slots=True)
class Close:
    """The attempt is over and nothing of it runs: forget it."""

    job: JobId
    attempt: int
    outcome: Outcome
    exit_code: int
    because: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over: the last order of a job."""

    job: JobId
    state: Standing
    exit_code: int
    because: str


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete what lies on disk of this job, which was over."""

    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """An event changed nothing, for this reason: for the log, and for whoever asked."""

    job: JobId
    because: str


Action: TypeAlias = Open | Run | Quit | Drain | Stop | Bury | Close | Finish | Discard | Ignored
