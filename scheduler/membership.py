"""Who belongs to a job: ids, incarnations, seniority, and how each member ended.

A member id is given out once: a newcomer without a wish gets the smallest number that never ran, so that a report which
says w1 means one process' life and not two. Whoever asks for an id by name becomes its next incarnation. Seniority is
the order of admission; the founders, who came in no order that matters, are sorted by number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

from .ids import (
    HIGHEST,
    MemberId,
    Name,
    Role,
    Seat,
    WorkerId,
    as_member,
    member_id,
    read_id,
    shard_id,
    worker_id,
)


class Fate(Enum):
    """How a member ended, as the verb of a sentence."""

    DONE = "finished"
    FAILED = "failed"
    LOST = "was lost"
    LEFT = "left"
    STOPPED = "was stopped"


@dataclass(frozen=True, slots=True)
class Alive:
    """A member. `entry` orders by seniority, the smallest first; a founder was here when the job began to run."""

    incarnation: int
    peer: str
    entry: int
    founder: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """A former member. `exit_code` is what a shell would have been told.

    Who was lost may come back as the next incarnation; `back_by` is for how long a job waits that has nobody else.
    """

    incarnation: int
    fate: Fate
    because: str
    exit_code: int = 0
    back_by: float | None = None

    @property
    def is_final(self) -> bool:
        """Its script has ended, and its agent does not start it again."""
        return self.fate is Fate.DONE or (self.fate is Fate.LOST and self.back_by is None)


Record: TypeAlias = Alive | Gone


def how_it_ended(member: MemberId, gone: Gone) -> str:
    """Of one that finished there is nothing more to say."""
    because = f": {gone.because}" if gone.because and gone.fate is not Fate.DONE else ""
    return f"{member} {gone.fate.value}{because}"


@dataclass(slots=True)
class Members:
    """The records of one job, one for each id that ever ran."""

    records: dict[MemberId, Record] = field(default_factory=dict)
    first_loss: Gone | None = None  # of the workers, by time
    entries: int = 0  # given out so far
    # Both say again what `records` says, to be found at once: who is alive, and who lives at a peer.
    _alive: dict[Role, dict[MemberId, Alive]] = field(init=False, repr=False)
    _at: dict[str, MemberId] = field(init=False, repr=False)
    _fresh: int = field(init=False, repr=False, default=0)  # every worker's number below it has run

    def __post_init__(self) -> None:
        self._alive, self._at = {"worker": {}, "shard": {}}, {}
        for member, record in self.records.items():
            if isinstance(record, Alive):
                self._alive[role_of(member)][member] = record
                self._at[record.peer] = member

    # -- asking --------------------------------------------------------------------------------------

    def current(self, member: str, incarnation: int) -> MemberId | None:
        """The member, if it is alive in this very incarnation."""
        record = self.records.get(as_member(member))
        return as_member(member) if isinstance(record, Alive) and record.incarnation == incarnation else None

    def why_not(self, member: str, incarnation: int) -> str:
        """Why there is no such member now."""
        record = self.records.get(as_member(member))
        member = member[:20]  # a stranger may call itself anything
        if record is None or incarnation > record.incarnation or incarnation < 1:
            return f"{member}#{incarnation} was never a member"
        if incarnation < record.incarnation:
            return f"{member}#{incarnation} is over: {member}#{record.incarnation} took its place"
        assert isinstance(record, Gone), f"{member}#{incarnation} is a member"
        return f"{member}#{incarnation} is over: it {record.fate.value}"

    def alive(self, role: Role) -> Mapping[MemberId, Alive]:
        return self._alive[role]

    def everybody(self) -> list[MemberId]:
        """All who are alive, the workers first."""
        return [*self._alive["worker"], *self._alive["shard"]]

    def workers(self) -> list[WorkerId]:
        """The active workers in order of seniority."""
        return [seat.worker for seat in self.seats()]

    def seats(self) -> tuple[Seat, ...]:
        """The roster: the active workers in order of seniority."""
        workers = sorted(self._alive["worker"].items(), key=lambda one: one[1].entry)
        return tuple(Seat(WorkerId(worker), record.incarnation, record.founder) for worker, record in workers)

    def gone(self, role: Role) -> list[tuple[MemberId, Gone]]:
        return [(m, r) for m, r in self.records.items() if isinstance(r, Gone) and role_of(m) == role]

    def at_peer(self, peer: str) -> MemberId | None:
        """The member that lives in this process."""
        return self._at.get(peer)

    def free_worker(self) -> Name | None:
        """The smallest number that never ran."""
        while worker_id(self._fresh) in self.records:
            self._fresh += 1
        return Name("worker", self._fresh) if self._fresh <= HIGHEST else None

    def free_shard(self, shards: int) -> Name | None:
        """The smallest number without a living shard. A shard's number is a place, where chunks belong, not a life."""
        free = (n for n in range(shards) if shard_id(n) not in self._alive["shard"])
        return next((Name("shard", n) for n in free), None)

    # -- changing ------------------------------------------------------------------------------------

    def admit(self, name: Name, peer: str) -> tuple[MemberId, Alive]:
        """A new member, or a new incarnation of a former one, which must have ended before."""
        member = member_id(name)
        former = self.records.get(member)
        assert not isinstance(former, Alive) and peer not in self._at, (member, peer)
        self._at[peer] = member
        incarnation = former.incarnation + 1 if former is not None else 1
        return member, self._enter(member, Alive(incarnation, peer, self._next_entry()))

    def found(self) -> None:
        """The job begins: everybody who is here is a founder."""
        for member in sorted(self.everybody(), key=number_of):
            record = self._alive[role_of(member)][member]
            self._enter(member, replace(record, entry=self._next_entry(), founder=True))

    def end(
        self, member: MemberId, fate: Fate, because: str, exit_code: int = 0, back_by: float | None = None
    ) -> Gone:
        """A member is gone. Its id stays its own."""
        record = self._alive[role_of(member)].pop(member)
        del self._at[record.peer]
        gone = self.records[member] = Gone(record.incarnation, fate, because, exit_code, back_by)
        if fate is Fate.LOST and role_of(member) == "worker":
            self.first_loss = self.first_loss or gone
        return gone

    def _next_entry(self) -> int:
        self.entries += 1
        return self.entries - 1

    def _enter(self, member: MemberId, record: Alive) -> Alive:
        self.records[member] = self._alive[role_of(member)][member] = record
        return record

    def check(self) -> None:
        """Every invariant, from scratch."""
        alive = {member: record for member, record in self.records.items() if isinstance(record, Alive)}
        assert alive == {**self._alive["worker"], **self._alive["shard"]}
        assert {record.peer: member for member, record in alive.items()} == self._at
        assert len(self._at) == len(alive), "one process is two members"
        assert len({record.entry for record in alive.values()}) == len(alive), (
            "two members are equally senior"
        )
        for member, record in self.records.items():
            assert read_id(member) is not None and record.incarnation >= 1, (member, record)


def role_of(member: MemberId) -> Role:
    return "worker" if member.startswith("w") else "shard"


def number_of(member: MemberId) -> int:
    return int(member[1:])
