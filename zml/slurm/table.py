"""What became of allocations: Slurm's words for their states, and ours. It asks nobody.

Rule: a state follows from what squeue says now and from what was known before; an allocation that waits after it had
run was requeued, and one that Slurm has forgotten is over. Slurm keeps a job that has ended for `MinJobAge`, by default
300 s, so whoever looks less often than that learns less.

States of Slurm are those of `squeue --format=%T` in its manual, section JOB STATE CODES.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    PENDING = "pending"  # waits for nodes
    RUNNING = "running"
    ENDED = "ended"  # by itself with 0, at its time limit, or because it was released
    FAILED = "failed"
    PREEMPTED = "preempted"  # and not coming again
    REQUEUED = "requeued"  # waits, after it has run

    @property
    def over(self) -> bool:
        return self in (State.ENDED, State.FAILED, State.PREEMPTED)


@dataclass(frozen=True, slots=True)
class Allocation:
    """`because` is Slurm's reason, or ours. `stuck`: it waits for what will not come by itself."""

    id: str
    state: State
    because: str = ""
    nodes: str = ""  # n[1-4], once it has some
    stuck: bool = False


STATES = {
    "PENDING": State.PENDING,
    "CONFIGURING": State.PENDING,
    "RESV_DEL_HOLD": State.PENDING,
    "RUNNING": State.RUNNING,
    "SUSPENDED": State.RUNNING,  # it has its nodes, if not their time
    "STOPPED": State.RUNNING,
    "RESIZING": State.RUNNING,
    "SIGNALING": State.RUNNING,
    "STAGE_OUT": State.RUNNING,
    "COMPLETING": State.RUNNING,  # its nodes are not free yet, and how it ends is not said yet
    "COMPLETED": State.ENDED,
    "CANCELLED": State.ENDED,
    "TIMEOUT": State.ENDED,
    "DEADLINE": State.ENDED,
    "FAILED": State.FAILED,
    "NODE_FAIL": State.FAILED,
    "BOOT_FAIL": State.FAILED,
    "OUT_OF_MEMORY": State.FAILED,
    "REVOKED": State.FAILED,
    "PREEMPTED": State.PREEMPTED,
    "REQUEUED": State.REQUEUED,
    "REQUEUE_FED": State.REQUEUED,
    "REQUEUE_HOLD": State.REQUEUED,
    "SPECIAL_EXIT": State.REQUEUED,
}
# Reasons for which a job waits until somebody changes something.
HOPELESS = frozenset(
    {
        "AccountNotAllowed",
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "JobHeldAdmin",
        "JobHeldUser",
        "PartitionDown",
        "PartitionInactive",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "QOSNotAllowed",
    }
)
FORMAT = "%i|%T|%r|%N"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `squeue --format=FORMAT`."""

    id: str
    state: str
    reason: str
    nodes: str


def rows(text: str) -> list[Row]:
    """What is no such line, a warning say, is passed over."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 4 and parts[0][:1].isdigit():
            found.append(Row(*parts))
    return found


def became(before: Allocation | None, row: Row) -> Allocation:
    """An allocation after a look. A state that this version does not know leaves it as it was."""
    was = before.state if before is not None else State.PENDING
    state = STATES.get(row.state, was)
    if state is State.PENDING and was in (State.RUNNING, State.REQUEUED):
        state = State.REQUEUED
    waits = state in (State.PENDING, State.REQUEUED)
    reason = "" if row.reason == "None" else row.reason
    held = row.state in ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
    because = reason or (row.state if state.over or row.state not in STATES else "")
    return Allocation(row.id, state, because, row.nodes, waits and (held or reason in HOPELESS))


def look(known: Mapping[str, Allocation], seen: Iterable[Row]) -> dict[str, Allocation]:
    """All allocations after a look, those that squeue knows no more included. Twice is the same as once."""
    now = {row.id: became(known.get(row.id), row) for row in seen}
    for id, allocation in known.items():
        if id not in now:
            over = allocation.state.over
            now[id] = allocation if over else Allocation(id, State.ENDED, "Slurm knows it no more")
    return now
