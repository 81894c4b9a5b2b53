"""Where a shard lives, and where its backup does.

With replicas a shard has two processes on the ring, its own and the next one: in one of them it lives, in the other
its backup is kept. Whichever dies, the other serves; whichever comes back, keeps the backup. That is the whole rule:
after a restart nothing moves back.

A backup counts while it is up to date, as the shard itself has reported; only then is it promoted. Each copy that a
shard makes of itself has a number, and so has each home: what is said of a former copy or from a former home means
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ids import ShardId, shard_id


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


def copy_name(shard: str, incarnation: int, copy: int) -> str:
    """A copy and its push log: never the name of another copy, of this home or a former one."""
    return f"{shard}-{incarnation}-{copy}"


def next_on_ring(shard: ShardId, shards: int) -> ShardId:
    return shard_id((int(shard[1:]) + 1) % shards)


def other_process(shard: ShardId, host: ShardId, shards: int) -> ShardId:
    """Of a shard's two processes the one in which it does not live."""
    return next_on_ring(shard, shards) if host == shard else shard
