"""Names. A job has workers w0, w1, ... and shards p0, p1, ...; the letter is the role, the number never changes hands
unless it is asked for by name.

Events carry a member as a peer wrote it, a plain `str`; actions carry the id of a member that exists.
"""

from typing import Literal, NamedTuple, NewType, TypeAlias

JobId = NewType("JobId", str)
WorkerId = NewType("WorkerId", str)
ShardId = NewType("ShardId", str)
MemberId: TypeAlias = WorkerId | ShardId
ChunkKey = NewType("ChunkKey", str)

Role: TypeAlias = Literal["worker", "shard"]

HIGHEST = 65_535  # a placement gives every chunk two bytes for its shard's number


class Name(NamedTuple):
    """A member id, taken apart."""

    role: Role
    number: int


def worker_id(number: int) -> WorkerId:
    return WorkerId(f"w{number}")


def shard_id(number: int) -> ShardId:
    return ShardId(f"p{number}")


def member_id(name: Name) -> MemberId:
    return worker_id(name.number) if name.role == "worker" else shard_id(name.number)


def read_id(text: str) -> Name | None:
    """What a peer calls a member, taken apart; None where that is no member id: "w", "p01", "w-1", "w99999"."""
    letter, digits = text[:1], text[1:]
    if letter not in ("w", "p") or not (digits.isascii() and digits.isdigit()) or len(digits) > 5:
        return None
    number = int(digits)
    if str(number) != digits or number > HIGHEST:
        return None
    return Name("worker" if letter == "w" else "shard", number)


def as_member(text: str) -> MemberId:
    """This text where a member's id is meant: to be looked up, or known to be one."""
    return WorkerId(text)


class Seat(NamedTuple):
    """One active worker of a generation. A founder is waited for from clock 0 on, others once they have entered."""

    worker: WorkerId
    incarnation: int
    founder: bool
