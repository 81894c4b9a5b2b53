"""What happened to jobs and nodes: the cluster machine's only input. Frozen, in the past tense.

Decisions are events too: what a round has decided is told to the machine like anything else, and written down before
it is carried out. Read again, a journal gives the same state, whatever policy decides by then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeAlias

from ..ids import JobId
from .request import Request
from .resources import Node, NodeId
from .rules import Rules


class Outcome(Enum):
    """How one attempt of a job has ended."""

    SUCCEEDED = auto()
    FAILED = auto()  # its script did
    LOST = auto()  # machines did
    DRAINED = auto()  # in order, with a checkpoint
    CANCELLED = auto()


class Late(Enum):
    """What did not happen by its deadline. With an attempt's outcome its deadlines are over but for the last."""

    BEGIN = auto()  # not everybody has come
    LIMIT = auto()  # the job has run for as long as it may
    LEAVE = auto()  # workers that were to leave, while the others go on
    DRAIN = auto()  # the attempt was to leave
    STOP = auto()  # it was stopped
    FINISH = auto()  # a script has come to its end, and not all have
    CLEAR = auto()  # it is over, and processes of it are still there


# -- from people -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    request: Request


@dataclass(frozen=True, slots=True)
class CancelAsked:
    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class PauseAsked:
    """Leave the nodes, with a checkpoint, and wait until somebody says otherwise."""

    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class ResumeAsked:
    job: JobId


@dataclass(frozen=True, slots=True)
class ScaleAsked:
    """From now on it is to have at least and at most so many workers."""

    job: JobId
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Discarded:
    """A job that is over is to be known no more, and its files are to go."""

    job: JobId
    because: str


# -- from nodes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeCame:
    """A machine offers its resources. Of another `boot` than before, all that it ran is gone."""

    node: Node
    boot: str


@dataclass(frozen=True, slots=True)
class NodeHeard:
    """Its lease begins anew."""

    node: NodeId
    boot: str


@dataclass(frozen=True, slots=True)
class NodeLeaving:
    """It wants to go: nothing new for it, and what it has is to leave in order."""

    node: NodeId
    because: str


@dataclass(frozen=True, slots=True)
class NodeLeft:
    """It said goodbye: nothing runs there."""

    node: NodeId
    because: str


@dataclass(frozen=True, slots=True)
class Gone:
    """A process of an attempt has ended, and stays so. `done`: its script came to its end."""

    job: JobId
    attempt: int
    slot: str
    because: str
    done: bool = False


# -- from an attempt's own coordinator ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Began:
    """Everybody is here: the scripts compute."""

    job: JobId
    attempt: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt is over; its processes may still be on their way out."""

    job: JobId
    attempt: int
    outcome: Outcome
    exit_code: int
    because: str


# -- the rounds' decisions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """An attempt begins. `slots`: names as members have them, w0, p0, and the node of each."""

    job: JobId
    attempt: int
    slots: dict[str, NodeId]
    because: str


@dataclass(frozen=True, slots=True)
class Grew:
    """More workers; or, after the loss of a node, a shard again."""

    job: JobId
    attempt: int
    slots: dict[str, NodeId]
    because: str


@dataclass(frozen=True, slots=True)
class Shrank:
    """These workers leave in order."""

    job: JobId
    attempt: int
    slots: list[str]
    because: str


@dataclass(frozen=True, slots=True)
class Preempted:
    """The attempt is drained for others, and the job waits for its turn."""

    job: JobId
    attempt: int
    because: str


# -- what time alone has done ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeLost:
    node: NodeId
    because: str


@dataclass(frozen=True, slots=True)
class TimeUp:
    """A deadline of this job has come. What was late is said, and by it is known what was done, whatever deadlines are
    found where this is read again."""

    job: JobId
    what: Late | None = None  # None: by a zml that did not say so
    slots: list[str] = field(default_factory=list)  # workers that did not leave


# -- from whoever starts the coordinator -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ruled:
    """From now on these rules are kept."""

    rules: Rules


Decision: TypeAlias = Started | Grew | Shrank | Preempted
Finding: TypeAlias = NodeLost | TimeUp
Event: TypeAlias = (
    Submitted
    | CancelAsked
    | PauseAsked
    | ResumeAsked
    | ScaleAsked
    | Discarded
    | NodeCame
    | NodeHeard
    | NodeLeaving
    | NodeLeft
    | Gone
    | Began
    | Ended
    | Ruled
    | Decision
    | Finding
)
