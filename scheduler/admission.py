"""Who may come in, and who may speak: decisions about one job that change nothing.

A worker may come at any time, under a new id or as the next incarnation of one it names. A shard has a place with a
number; once its former process is gone another may take the place, and then has to show that it has the chunks. While
a job runs it may grow by the shard with the next number.
"""

from .actions import Admit, Refuse
from .events import (
    BackupLost,
    BackupReady,
    Died,
    Exited,
    FromMember,
    Joined,
    Left,
    Loaded,
    Registered,
    Renewed,
    Returned,
    Vacating,
)
from .explain import counted
from .ids import Name, Role, ShardId, as_member, read_id, shard_id
from .leases import Leases
from .membership import Alive, role_of
from .state import Job, Running

LETTERS: dict[Role, str] = {"worker": "w", "shard": "p"}


def place_for(job: Job, event: Joined, leases: Leases) -> Name | Admit | Refuse:
    """The id that this process is to have; or the answer that it got already, or must get instead.

    Whoever asks by name for an id that is still alive is trusted to know better, and the former process is fenced; but
    for a shard only when the former has been silent for half a lease: a shard that was started twice by mistake does
    not steal the place of the first.
    """
    here = job.members.at_peer(event.peer)
    if here is not None and role_of(here) == event.role and event.member in ("", here):
        number = job.members.records[here].incarnation
        return Admit(job.id, event.peer, here, number, job.generation, f"this process is {here} already")
    wish = read_id(event.member)
    if here is not None:
        why_not = f"this process is {here} already"
    elif event.member and (wish is None or wish.role != event.role):
        letter = LETTERS[event.role]
        why_not = f"{event.member[:20]!r} names no {event.role}: they are {letter}0, {letter}1, ..."
    elif event.role == "worker" and (why_not := _why_not_again(job, event)):
        pass
    elif event.role == "worker":
        if name := wish or job.members.free_worker():
            return name
        why_not = f"job {job.id} has given out every worker's number"
    elif wish is None:
        if name := job.members.free_shard(job.shards):
            return name
        why_not = f"job {job.id} has its {counted(job.shards, 'shard')}"
    elif grows(job, wish):
        return wish
    elif wish.number >= job.shards:
        next_one = (
            f"; the next to join it is {shard_id(job.shards)}" if isinstance(job.phase, Running) else ""
        )
        has = f"job {job.id} has {counted(job.shards, 'shard')}"
        why_not = f"{has}: there is no {shard_id(wish.number)}{next_one}"
    else:
        why_not = _why_not_shard(job, shard_id(wish.number), leases)
        if not why_not:
            return wish
    return Refuse(job.id, event.peer, why_not)


def grows(job: Job, name: Name) -> bool:
    """Is this one more shard than the job has?"""
    return name.role == "shard" and name.number == job.shards and isinstance(job.phase, Running)


def _why_not_again(job: Job, event: Joined) -> str:
    """A process that was this worker before does not fence the one that took its place meanwhile."""
    member = as_member(event.member)
    record = job.members.records.get(member)
    if not event.former or not isinstance(record, Alive) or record.incarnation <= event.former:
        return ""
    return f"{member}#{event.former} is over: another process is {member}#{record.incarnation}"


def _why_not_shard(job: Job, shard: ShardId, leases: Leases) -> str:
    if (job.id, shard) not in leases:
        return ""
    if leases.is_silent((job.id, shard)):
        return ""
    return f"{shard} is another process, which was heard {leases.silent_s((job.id, shard)):.1f} s ago"


def why_stranger(job: Job, event: FromMember) -> str:
    """Why this event does not come from a member, nor is of one; empty when it does."""
    match event:
        case Renewed(member=name) | Left(member=name) | Died(member=name):
            role = None
        case (
            Returned(member=name) | BackupReady(member=name) | BackupLost(member=name) | Vacating(member=name)
        ):
            role = "shard"
        case Registered(worker=name) | Loaded(worker=name) | Exited(worker=name):
            role = "worker"
    member = job.members.current(name, event.incarnation)
    if member is None:
        return job.members.why_not(name, event.incarnation)
    assert isinstance(job.members.records[member], Alive)
    if role in (None, role_of(member)):
        return ""
    return f"{member} runs no script" if role == "worker" else f"{member} holds no chunks"
