"""Who belongs to a job: ids, incarnations, seniority, and how each member ended.

A member id is given out once: a newcomer without a wish gets the smallest number that never ran, so that a report which
says w1 means one process' life and not two. Whoever asks for an id by name becomes its next incarnation. Seniority is
the order of admission; the founders, who came in no order that matters, are sorted by number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import TypeAlias

from .ids import HIGHEST, MemberId, Name, Role, Seat, WorkerId, member_id, read_id, shard_id, worker_id


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
    """A former member. `exit_code` is what a shell would have been told."""

    incarnation: int
    fate: Fate
    because: str
    exit_code: int = 0


Record: TypeAlias = Alive | Gone


def how_it_ended(member: MemberId, gone: Gone) -> str:
    return f"{member} {gone.fate.value}: {gone.because}" if gone.because else f"{member} {gone.fate.value}"


class Members:
    """The records of one job, one for each id that ever ran."""

    def __init__(self) -> None:
        self.records: dict[MemberId, Record] = {}
        self.first_loss: Gone | None = None  # of the workers, by time
        self._entries = count()

    # -- asking --------------------------------------------------------------------------------------

    def current(self, member: str, incarnation: int) -> MemberId | None:
        """The member, if it is alive in this very incarnation."""
        name = read_id(member)
        if name is None:
            return None
        record = self.records.get(member_id(name))
        return member_id(name) if isinstance(record, Alive) and record.incarnation == incarnation else None

    def why_not(self, member: str, incarnation: int) -> str:
        """Why there is no such member now."""
        name = read_id(member)
        record = self.records.get(member_id(name)) if name is not None else None
        if name is None or record is None or incarnation > record.incarnation or incarnation < 1:
            return f"{member}#{incarnation} was never a member"
        if incarnation < record.incarnation:
            return f"{member}#{incarnation} is over: {member}#{record.incarnation} took its place"
        assert isinstance(record, Gone), f"{member}#{incarnation} is a member"
        return f"{member}#{incarnation} is over: it {record.fate.value}"

    def alive(self, role: Role | None = None) -> Iterator[tuple[MemberId, Alive]]:
        """In the order in which their ids were first given out."""
        for member, record in self.records.items():
            if isinstance(record, Alive) and role in (None, role_of(member)):
                yield member, record

    def workers(self) -> list[WorkerId]:
        """The active workers in order of seniority."""
        workers = sorted(self.alive("worker"), key=lambda one: one[1].entry)
        return [WorkerId(worker) for worker, _ in workers]

    def seats(self) -> tuple[Seat, ...]:
        """The roster: the active workers in order of seniority."""
        found = []
        for worker in self.workers():
            record = self.records[worker]
            assert isinstance(record, Alive)
            found.append(Seat(worker, record.incarnation, record.founder))
        return tuple(found)

    def gone(self, role: Role) -> list[tuple[MemberId, Gone]]:
        return [(m, r) for m, r in self.records.items() if isinstance(r, Gone) and role_of(m) == role]

    def at_peer(self, peer: str) -> MemberId | None:
        """The member that lives in this process."""
        return next((member for member, record in self.alive() if record.peer == peer), None)

    def free_worker(self) -> Name | None:
        """The smallest number that never ran."""
        free = (n for n in range(HIGHEST + 1) if worker_id(n) not in self.records)
        return next((Name("worker", n) for n in free), None)

    def free_shard(self, shards: int) -> Name | None:
        """The smallest number without a living shard. A shard's number is a place, where chunks belong, not a life."""
        free = (n for n in range(shards) if not isinstance(self.records.get(shard_id(n)), Alive))
        return next((Name("shard", n) for n in free), None)

    # -- changing ------------------------------------------------------------------------------------

    def admit(self, name: Name, peer: str) -> tuple[MemberId, Alive]:
        """A new member, or a new incarnation of a former one, which must have ended before."""
        member = member_id(name)
        former = self.records.get(member)
        assert not isinstance(former, Alive), member
        record = Alive(former.incarnation + 1 if former is not None else 1, peer, next(self._entries))
        self.records[member] = record
        return member, record

    def found(self) -> None:
        """The job begins: everybody who is here is a founder."""
        by_number = sorted(self.alive(), key=lambda one: number_of(one[0]))
        for member, record in by_number:
            self.records[member] = Alive(record.incarnation, record.peer, next(self._entries), founder=True)

    def end(self, member: MemberId, fate: Fate, because: str, exit_code: int = 0) -> Gone:
        record = self.records[member]
        assert isinstance(record, Alive), member
        gone = self.records[member] = Gone(record.incarnation, fate, because, exit_code)
        if fate is Fate.LOST and role_of(member) == "worker":
            self.first_loss = self.first_loss or gone
        return gone

    def check(self) -> None:
        """Every invariant, from scratch."""
        peers = [record.peer for _, record in self.alive()]
        assert len(set(peers)) == len(peers), f"one process is two members: {peers}"
        entries = [record.entry for _, record in self.alive()]
        assert len(set(entries)) == len(entries), f"two members are equally senior: {entries}"
        for member, record in self.records.items():
            assert read_id(member) is not None and record.incarnation >= 1, (member, record)


def role_of(member: MemberId) -> Role:
    return "worker" if member.startswith("w") else "shard"


def number_of(member: MemberId) -> int:
    return int(member[1:])
