"""What to do: the machine's only output. Orders, each with the sentence that says why.

`because` is for people: it goes to the log, to `zml status` and into the events of the run. Performing an order twice
is the same as once, for after a crash one may be repeated.
"""

from dataclasses import dataclass
from typing import TypeAlias

from .ids import JobId, MemberId, Seat, ShardId, WorkerId
from .state import State


@dataclass(frozen=True, slots=True)
class Admit:
    """Tell this peer who it is from now on."""

    job: JobId
    peer: str
    member: MemberId
    incarnation: int
    generation: int
    because: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell this peer no. Nothing has changed."""

    job: JobId
    peer: str
    because: str


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell every shard who the active workers are, in order of seniority. A shard ignores older generations."""

    job: JobId
    generation: int
    seats: tuple[Seat, ...]
    because: str


@dataclass(frozen=True, slots=True)
class Launch:
    """Let this worker's agent start the script."""

    job: JobId
    worker: WorkerId
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class Place:
    """Give every shard the layout and the placement: chunk i lives on shard number `placement[i]`."""

    job: JobId
    placement: tuple[int, ...]
    because: str


@dataclass(frozen=True, slots=True)
class Initialise:
    """This worker's parameters become version 0. It replaces whoever was to do it before."""

    job: JobId
    worker: WorkerId
    because: str


@dataclass(frozen=True, slots=True)
class Await:
    """Nobody serves the chunks of this shard: workers that need them wait for it, until `until`."""

    job: JobId
    shard: ShardId
    until: float
    because: str


@dataclass(frozen=True, slots=True)
class Rehome:
    """This shard serves its chunks again: tell it what it has missed, and every script where it is."""

    job: JobId
    shard: ShardId
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class Grow:
    """The job has one more shard: it is to get its share of the chunks."""

    job: JobId
    shard: ShardId
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class Promote:
    """Let the backup in this process serve: it is the shard from now on. `log` names the copy that is meant."""

    job: JobId
    shard: ShardId
    host: ShardId
    incarnation: int
    log: str
    because: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """Let this process read the log `log` of a process that is gone: it is the shard from now on."""

    job: JobId
    shard: ShardId
    host: ShardId
    incarnation: int
    log: str
    because: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Let this shard, which serves, keep a copy in this process. `number` counts what it is told of its copy."""

    job: JobId
    shard: ShardId
    host: ShardId
    host_incarnation: int
    number: int
    because: str


@dataclass(frozen=True, slots=True)
class Unpair:
    """Tell this shard, which serves, that this process with its backup is gone: it need not find out by waiting."""

    job: JobId
    shard: ShardId
    host: ShardId
    host_incarnation: int
    number: int
    because: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Refuse everything from this incarnation, and tell it so if it can be reached."""

    job: JobId
    member: MemberId
    incarnation: int
    because: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End this member: an agent with its script, or a shard."""

    job: JobId
    member: MemberId
    because: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Give out no more batches; scripts finish their step, save and leave."""

    job: JobId
    because: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over: the last order of a job."""

    job: JobId
    state: State
    exit_code: int
    because: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """An event changed nothing, for this reason: for the log."""

    job: JobId
    because: str


Action: TypeAlias = (
    Admit
    | Refuse
    | Announce
    | Launch
    | Place
    | Initialise
    | Await
    | Rehome
    | Grow
    | Promote
    | Adopt
    | Pair
    | Unpair
    | Fence
    | Stop
    | Drain
    | Finish
    | Ignored
)
