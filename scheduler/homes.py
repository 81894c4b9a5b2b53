"""Where a shard lives, and where its copies are made.

The processes form a ring. A shard belongs in its own process, the one with its name, or in the next that is on the
ring; with replicas it belongs in both: in one of them it lives, in the other its backup is kept. Whichever dies, the
other serves; whichever comes back, keeps the backup, and nothing moves back.

A process leaves the ring when it is to leave the job, or does not come back in time, and is on it again when it has
joined again. A shard that lives where it does not belong is moved: a copy is made where it does, and as soon as that is
in step it is promoted, as when a process dies. So when a process leaves or comes only those shards move that lived in
it or belong in it (Karger et al., STOC 1997), one after the other, and each goes on until its copy has all of it.

A backup counts while it is up to date, as the shard itself has reported; only then is it promoted. Each copy that a
shard makes of itself has a number, and so has each home: what is said of a former copy or from a former home means
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Container
from dataclasses import dataclass

from .ids import MemberId, ShardId, shard_id


@dataclass(frozen=True, slots=True)
class Home:
    """The process that serves a shard, or is waited for because it did last. `log` names its push log there.

    `incarnation` counts the homes that the shard has had, and every return to one.
    """

    host: ShardId
    incarnation: int
    log: str


@dataclass(frozen=True, slots=True)
class Backup:
    """A copy that has all of what its shard acknowledges. It dies with this very process."""

    host: ShardId
    host_incarnation: int
    copy: int


@dataclass(frozen=True, slots=True)
class Copying:
    """The newest word on where a shard is to make its copy. `number` counts these words."""

    number: int
    host: ShardId
    host_incarnation: int


def copy_name(shard: str, incarnation: int, copy: int) -> str:
    """A copy and its push log: never the name of another copy, of this home or a former one."""
    return f"{shard}-{incarnation}-{copy}"


def around(shard: ShardId, shards: int) -> list[ShardId]:
    """All processes, from the shard's own on."""
    return [shard_id((int(shard[1:]) + step) % shards) for step in range(shards)]


def belongs(shard: ShardId, shards: int, replicas: int, off: Collection[ShardId]) -> list[ShardId]:
    """The processes in which a shard belongs; `off` are not on the ring."""
    return [process for process in around(shard, shards) if process not in off][: 1 + replicas]


def is_misplaced(shard: ShardId, host: ShardId, shards: int, replicas: int, off: Collection[ShardId]) -> bool:
    """Does a shard that lives in `host` belong elsewhere?"""
    places = belongs(shard, shards, replicas, off)
    return bool(places) and host not in places


def copy_at(
    shard: ShardId,
    host: ShardId,
    shards: int,
    replicas: int,
    off: Collection[ShardId],
    here: Container[MemberId],
) -> ShardId | None:
    """Where a shard that lives in `host` is to have its copy: its backup or, where it is misplaced, its next home.

    `here` are the processes that are alive. None where there is no such place now. A shard that has to go, and whose
    next place is away, goes to whoever is here, and from there where it belongs.
    """
    places = belongs(shard, shards, replicas, off)
    if host in off:
        places = [process for process in around(shard, shards) if process not in off]
    return next((process for process in places if process != host and process in here), None)
