"""What happened: the machine's only input. Frozen, in the past tense, each of one job.

`member` and `worker` are what a peer called itself; whether there is such a member is the machine's to find out.
An event that comes from a member, or tells of its death, names its incarnation: what a former self sends, and what is
said of it, changes nothing.
"""

from dataclasses import dataclass
from typing import TypeAlias

from .ids import HIGHEST, JobId, MemberId, Role, ShardId


@dataclass(frozen=True, slots=True)
class Submitted:
    """Somebody wants a job to run. `staleness` is the bound s: 0 is BSP, None is asynchronous.

    `resumed`: the shards bring the first parameters themselves, from a checkpoint.
    """

    job: JobId
    workers: int
    shards: int
    staleness: int | None
    resumed: bool = False
    replicas: int = 0  # backups of each shard

    def __post_init__(self) -> None:
        for name in ("workers", "shards"):
            if not 1 <= getattr(self, name) <= HIGHEST + 1:
                raise ValueError(f"{name} must be 1 to {HIGHEST + 1:,}, not {getattr(self, name):,}")
        if self.staleness is not None and self.staleness < 0:
            raise ValueError(f"staleness must not be negative, not {self.staleness}")
        if not 0 <= self.replicas <= min(1, self.shards - 1):
            raise ValueError(f"replicas must be 0, or 1 with 2 shards or more, not {self.replicas}")


@dataclass(frozen=True, slots=True)
class Joined:
    """A process asks to be a member. `member` is the id it wants, or empty. `peer` names one process, never two.

    `former` is the incarnation of that id which this very process was before; 0 if it was none.
    """

    job: JobId
    role: Role
    member: str
    peer: str
    former: int = 0


@dataclass(frozen=True, slots=True)
class Renewed:
    """A member was heard: its lease begins anew, `times` as long as usual, for it speaks so much seldomer."""

    job: JobId
    member: str
    incarnation: int
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class Registered:
    """A script showed its layout: `digest` of it, and how many chunks it has."""

    job: JobId
    worker: str
    incarnation: int
    digest: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """The initialiser has brought the first parameters to every shard."""

    job: JobId
    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Returned:
    """A shard has read what its former self has left, or its backup is ready to serve.

    `holds` is the digest of the layout of its chunks, or empty; `shard` is empty where it is the member itself.
    """

    job: JobId
    member: str
    incarnation: int
    holds: str
    shard: str = ""


@dataclass(frozen=True, slots=True)
class BackupReady:
    """From the home of a shard: from now on it acknowledges only what its backup has, too."""

    job: JobId
    member: str
    incarnation: int
    shard: str
    home: int  # which of the shard's homes this is
    copy: int
    host: str
    host_incarnation: int


@dataclass(frozen=True, slots=True)
class BackupLost:
    """From the home of a shard: it will acknowledge what this copy of it does not have."""

    job: JobId
    member: str
    incarnation: int
    shard: str
    home: int
    copy: int


@dataclass(frozen=True, slots=True)
class Vacating:
    """A shard's process is to leave, and asks where what it has is to go."""

    job: JobId
    member: str
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class NotPromoted:
    """Whoever was to take a shard over cannot serve it, or its process does not say that it does."""

    job: JobId
    shard: ShardId
    home: int
    because: str


@dataclass(frozen=True, slots=True)
class Exited:
    """A script ended, by a signal where `signal` is not 0. `because` follows on the worker's name: "its script ...".

    `is_loss`: whatever it ended with is the loss of a worker, and no failure of the script.
    `returns`: its agent will start it again, and asks to be a member for that.
    """

    job: JobId
    worker: str
    incarnation: int
    code: int
    signal: int
    because: str
    returns: bool = False
    is_loss: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """An orderly goodbye: nothing of this member is in flight."""

    job: JobId
    member: str
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class Died:
    """From whoever started it: the process of this member has ended. Nothing if the member has said so before."""

    job: JobId
    member: str
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class DrainAsked:
    """Finish the step, save, leave."""

    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """End now; nothing needs to be saved."""

    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed: a deadline that the machine had given is reached."""

    job: JobId


@dataclass(frozen=True, slots=True)
class Lost:
    """The machine's own finding, from nobody else: a member's lease has ended."""

    job: JobId
    member: MemberId
    because: str


@dataclass(frozen=True, slots=True)
class TimeUp:
    """The machine's own finding too: those who were to stop, or to come back, have had their time."""

    job: JobId


FromMember: TypeAlias = (
    Renewed | Registered | Loaded | Returned | BackupReady | BackupLost | Vacating | Exited | Left | Died
)
Event: TypeAlias = (
    Submitted
    | Joined
    | Renewed
    | Registered
    | Loaded
    | Returned
    | BackupReady
    | BackupLost
    | Vacating
    | NotPromoted
    | Exited
    | Left
    | Died
    | DrainAsked
    | Cancelled
    | Ticked
)
Finding: TypeAlias = Lost | TimeUp
