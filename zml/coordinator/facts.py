"""What a coordinator must not forget and neither its machine nor its ledger knows: one frozen struct for each thing."""

from __future__ import annotations

import msgspec

from ..messages import Finished, JobSpec
from ..status import MemberFailure


class Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that neither machine nor ledger knows."""


class Begun(Fact, frozen=True):
    """A job: what was asked for, and what its members are told when they join."""

    job: str
    spec: JobSpec
    lease_s: float
    heartbeat_s: float
    at: float  # seconds since the Unix epoch, as in every fact
    begin_with: str = ""  # the checkpoint that the chunks begin with
    steps_before: int = 0  # of the runs before
    manifest: str = ""  # the xxh3 of the manifest of `begin_with`


class Listening(Fact, frozen=True):
    """A process serves the job from now on."""

    addresses: list[str]
    pid: int
    host: str
    at: float


class Entered(Fact, frozen=True):
    """A member described itself. `addresses` is where a shard takes pushes. A `pid` of 0 was not written down."""

    member: str
    incarnation: int
    role: str
    node: str
    device: str
    addresses: list[str]
    pid: int = 0
    metrics: str = ""  # http://HOST:PORT


class Shown(Fact, frozen=True):
    """The layout that counts: a `layout.Registration` as its bytes."""

    registration: bytes


class Owed(Fact, frozen=True):
    """This shard is still to count a lost worker's step, which counts elsewhere; or, if `paid`, it has."""

    shard: str
    step: Finished
    paid: bool


class Serving(Fact, frozen=True):
    """Where a shard takes pushes: in its own process, or in that which keeps its backup."""

    shard: str
    addresses: list[str]


class Deciding(Fact, frozen=True):
    """An edition of the placement is about to be made: shards may have done their part in it already."""

    edition: int


class Spread(Fact, frozen=True):
    """An edition of the placement: which shard, as a number, holds each bucket from now on."""

    edition: int
    holders: list[int]


class Took(Fact, frozen=True):
    """A shard has taken the layout: from now on it may hold parameters that nobody else has."""

    shard: str


class Noted(Fact, frozen=True):
    """What the senior worker's script says of itself at the start of an epoch (`notes`)."""

    epoch: int
    note: bytes


class Spoke(Fact, frozen=True):
    """The endpoint of a worker's script."""

    worker: str
    peer: str


class Claimed(Fact, frozen=True):
    """This worker may write this file."""

    what: str
    worker: str


class Failed(Fact, frozen=True):
    """How a script failed."""

    failure: MemberFailure


class Progressed(Fact, frozen=True):
    """What the members' reports add up to. Written now and then: nothing is decided by it."""

    samples: dict[str, tuple[int, int]]  # of each member, and of its former incarnations
    epochs: int
    training_s: float


FACTS: dict[str, type[Fact]] = {kind.__name__: kind for kind in Fact.__subclasses__()}


class Facts(msgspec.Struct):
    """What the facts add up to, and what follows from the machine's orders."""

    begun: Begun | None = None
    listening: Listening | None = None  # the latest
    boots: int = 0
    entered: dict[str, Entered] = {}  # by member, the latest
    peers: dict[str, str] = {}  # member -> the endpoint that speaks for it
    registration: bytes = b""
    placement: tuple[int, ...] = ()
    holders: list[int] = []  # by bucket; empty: as it was placed
    edition: int = 0
    deciding: int = 0  # an edition; 0 where none is being made
    noted: Noted | None = None  # the newest
    serving: dict[str, list[str]] = {}  # by shard
    owed: dict[str, list[Finished]] = {}  # by shard
    took: list[str] = []  # the shards that have the layout
    initialiser: str = ""
    scripts: dict[str, str] = {}  # worker -> the endpoint of its script
    claims: dict[str, str] = {}  # what -> the worker that may write it
    failures: list[MemberFailure] = []
    progress: Progressed | None = None

    @property
    def holding(self) -> set[int]:
        """The shards that hold something, as numbers."""
        return set(self.holders or self.placement)

    def note(self, fact: Fact) -> None:
        match fact:
            case Begun():
                self.begun = fact
            case Listening():
                self.listening = fact
                self.boots += 1
            case Entered():
                self.entered[fact.member] = fact
            case Shown():
                self.registration = fact.registration
            case Noted():
                self.noted = fact
            case Owed(shard, step, paid):
                steps = [each for each in self.owed.get(shard, []) if each != step]
                self.owed[shard] = steps if paid else [*steps, step]
            case Deciding():
                self.deciding = fact.edition
            case Spread():
                self.edition, self.holders, self.deciding = fact.edition, fact.holders, 0
            case Serving():
                self.serving[fact.shard] = fact.addresses
            case Took():
                if fact.shard not in self.took:
                    self.took.append(fact.shard)
            case Spoke():
                self.scripts[fact.worker] = fact.peer
            case Claimed():
                self.claims[fact.what] = fact.worker
            case Failed():
                self.failures.append(fact.failure)
            case Progressed():
                self.progress = fact
