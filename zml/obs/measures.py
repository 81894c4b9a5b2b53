"""What several metrics say together. A panel and the alert that points at it ask for the same expression.

Step times alone do not find a straggler: where workers wait for each other, as in sync, the steps of all of them take
as long as the slowest one's. A worker's own time leaves out what it waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..figures import PHASES
from ..metrics import catalog as c
from .promql import Scope

OWN = "=~" + "|".join(phase for phase in PHASES if phase != "wait")
WHOLE = "=~" + "|".join(PHASES)
HERE = "=~joined|active"


def phase_time(scope: Scope, by: Sequence[str] = ()) -> str:
    """Seconds per step, by phase: they add up to the time of a step."""
    per = f"/ on ({', '.join(by)}) group_left ()"
    return f"{scope.rate(c.PHASE, (*by, 'phase'), phase=WHOLE)} {per} {scope.rate(c.STEPS, by)}"


def own_time(scope: Scope, by: Sequence[str]) -> str:
    """Seconds per step without those in which it waits for others."""
    return f"{scope.rate(c.PHASE, by, phase=OWN)} / {scope.rate(c.STEPS, by)}"


def share(scope: Scope, phase: str, by: Sequence[str]) -> str:
    """Of the training thread's time, what goes into one phase."""
    return f"{scope.rate(c.PHASE, by, phase=phase)} / {scope.rate(c.PHASE, by, phase=WHOLE)}"


def to_median(expr: str, group: Sequence[str], all_of: str = "") -> str:
    """Each series as a multiple of the median of its group, or of that of `all_of`; of two, of the smaller one: their
    median is as near to the one as to the other, and nobody could be twice as slow."""
    every, by = all_of or expr, ", ".join(group)
    of_two = f"min by ({by}) ({every}) and on ({by}) count by ({by}) ({every}) == 2"
    return _to(expr, f"({of_two} or quantile by ({by}) (0.5, {every}))", group)


def to_mean(expr: str, group: Sequence[str], all_of: str = "") -> str:
    """Each series as a multiple of the mean of its group, or of that of `all_of`."""
    return _to(expr, f"avg by ({', '.join(group)}) ({all_of or expr})", group)


def _to(expr: str, middle: str, group: Sequence[str]) -> str:
    return f"({expr}) / on ({', '.join(group)}) group_left () {middle}"


def traffic(scope: Scope, by: Sequence[str]) -> str:
    """Bytes per second, in and out, of shards."""
    return f"{scope.rate(c.SHARD_SENT, by)} + {scope.rate(c.SHARD_RECEIVED, by)}"


def checkpoint_age(scope: Scope, by: Sequence[str]) -> str:
    return f"time() - {scope.max(c.CHECKPOINT_AT, by)}"
