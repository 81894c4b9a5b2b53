"""What there is of a pool: allocations, and the nodes that they have become. And when more may be asked for, after some
that were asked for have come to nothing.

Rules: whatever exists counts against what the owner allows, until it is gone; what is stuck or on its way out is no
node that comes. After each try that has failed the pause before the next one is twice as long; a node that has come
and stays for a while ends that.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from ..scheduler.cluster.resources import NodeId
from ..slurm.table import Allocation, State
from .nodes import POOLED

MOST_PAUSE_S = 600.0
STAYED_S = 30.0


@dataclass(frozen=True, slots=True)
class Inventory:
    staying: list[NodeId]
    leaving: list[NodeId]
    ending: list[str]  # allocations whose nodes have left, and that are not over
    coming: list[str]  # that run, and whose nodes are not here yet
    waiting: list[str]  # for their machines
    stuck: list[Allocation]  # that wait for what will not come by itself

    @property
    def count(self) -> int:
        """Nodes that there are or will be."""
        return len(self.staying) + len(self.coming) + len(self.waiting)

    @property
    def going(self) -> int:
        return len(self.leaving) + len(self.ending)


def inventory(alive: Sequence[Allocation], nodes: Mapping[NodeId, bool], told: Container[str]) -> Inventory:
    """`nodes`: those of the pool that are here, and whether they leave; some may be of no allocation, as where another
    coordinator asked for them. `told`: allocations whose nodes were on their way out."""
    ids = {each.id for each in alive}
    here = {allocation_of(name, ids) for name in nodes}
    absent = [each for each in alive if each.id not in here]
    runs = [each.id for each in absent if each.state is State.RUNNING]
    waits = [each for each in absent if each.state is not State.RUNNING]
    return Inventory(
        staying=[name for name, leaves in nodes.items() if not leaves],
        leaving=[name for name, leaves in nodes.items() if leaves],
        ending=[id for id in runs if id in told],
        coming=[id for id in runs if id not in told],
        waiting=[each.id for each in waits if not each.stuck],
        stuck=[each for each in waits if each.stuck],
    )


def allocation_of(name: str, ids: Container[str]) -> str:
    """The allocation that this node is: its name is pool-ID or, of Slurm, pool-ID-PID; empty where it is of none."""
    rest = name.removeprefix(POOLED)
    return next((id for id in (rest, rest.rpartition("-")[0]) if id in ids), "")


@dataclass(frozen=True, slots=True)
class Trouble:
    """Tries in a row that have come to nothing, and why the last one has."""

    times: int
    since: float
    until: float  # nothing is asked for before
    because: str

    def said(self, now: float) -> str:
        if now < self.until:
            return f"{self.because}; more are asked for in {self.until - now:.0f} s"
        return f"before that, {self.because}"


def worse(before: Trouble | None, now: float, because: str, look_s: float) -> Trouble:
    """One more has failed; what fails while nothing is asked for belongs to the same try."""
    if before is not None and now < before.until:
        return replace(before, because=because)
    times = 1 if before is None else before.times + 1
    return Trouble(times, now, now + min(look_s * 2.0 ** min(times, 30), MOST_PAUSE_S), because)


def is_over(trouble: Trouble, came: Mapping[NodeId, float], now: float) -> bool:
    """`came`: when the nodes that are here were seen first."""
    return any(at > trouble.since and now - at >= STAYED_S for at in came.values())
