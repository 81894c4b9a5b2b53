"""What a worker and a shard count of themselves, from the start of their process: one struct each.

The same struct travels to the coordinator (`messages.Report`, `messages.Gauge`), stands in the status, in the run's
history and behind `/metrics`. Everything is cumulative but what is said to be `now`: whoever wants a rate takes two of
them, and one that is lost is no loss. Seconds and bytes. Unknown fields are ignored, so that an older viewer reads a
newer run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

# What the training thread does, in this order: these add up to its time between the first step and the newest. `data`
# is inside of the loader, but where that waits for other members (for an epoch to begin or to end), which is `wait`.
PHASES = ("data", "compute", "encode", "wait", "apply")
# What the I/O thread does beside it: the time until every shard has counted a step, and until parameters are here.
# Where it does not fit beside the next step, the training thread shows it as `wait`.
BESIDE = ("push", "pull")

# Upper bounds of the classes in which durations and stalenesses are counted; one more class holds what is above.
STEP_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
APPLY_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
STALENESS_BOUNDS = (0, 1, 2, 4, 8, 16, 32)
MOST_WORDS = 400  # characters of a sentence, which has to fit into the header of a message


class GpuFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of the worker's device, now. None: its driver does not say."""

    utilization: float | None = None  # 0 to 1
    memory_used_bytes: int | None = None
    memory_bytes: int | None = None
    power_w: float | None = None


class WorkerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one script's process."""

    steps: int = 0
    samples: int = 0
    left_out: int = 0  # steps whose gradient was not finite
    phases: dict[str, float] = {}  # seconds, by the names in PHASES and BESIDE
    step_s: list[int] = []  # steps by duration, in the classes of STEP_BOUNDS_S
    step_sum_s: float = 0.0
    staleness: list[int] = []  # steps by staleness, in the classes of STALENESS_BOUNDS
    staleness_sum: int = 0
    sent_bytes: int = 0  # gradients, as they left
    received_bytes: int = 0  # parameters, as they came
    dense_sent_bytes: int = 0  # the same gradients, were they sent whole in their own type
    dense_received_bytes: int = 0
    learning_rate: float | None = None  # of the first parameter group, now
    compress: str = ""  # what `--compress auto` has come to, now; empty where it was not asked for
    memory_bytes: int = 0  # resident, now
    cpu_s: float = 0.0  # of all its threads
    open_files: int = 0  # and sockets, now
    gpu: GpuFigures | None = None


class ShardFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one shard, in the process in which it lives."""

    updates: int = 0  # made to the parameters
    version: int = 0  # of its newest chunk, now
    chunks: int = 0  # now
    parameter_bytes: int = 0  # now
    optimizer_bytes: int = 0  # now
    log_bytes: int = 0  # of its push log, now
    pushes: int = 0  # and commits, that were taken
    duplicates: int = 0  # pushes and commits that had counted before, and were answered so
    refused: int = 0  # pushes and commits that were not taken
    pulls: int = 0
    parked: int = 0  # pulls that wait for other workers, now
    staged: int = 0  # pushes that wait for their commit or for the rest of their clock, now
    received_bytes: int = 0  # gradients, as they came
    sent_bytes: int = 0  # parameters, as they left
    dense_received_bytes: int = 0  # the same gradients, were they sent whole in fp32
    dense_sent_bytes: int = 0
    apply_s: list[int] = []  # updates by duration, in the classes of APPLY_BOUNDS_S
    apply_sum_s: float = 0.0
    memory_bytes: int = 0  # resident in its process, now
    # Why what would change it is refused now: its disk is full; MOST_WORDS characters at most.
    no_room: str = ""


def after(former: WorkerFigures, newer: WorkerFigures | None) -> WorkerFigures:
    """Of a worker whose script was started again: what both have counted, and what the newer one says of now."""
    if newer is None:
        return former
    added = _added(former, newer, _SUMS, ("step_s", "staleness"))
    phases = {*former.phases, *newer.phases}
    added["phases"] = {name: former.phases.get(name, 0.0) + newer.phases.get(name, 0.0) for name in phases}
    return msgspec.structs.replace(newer, **added)


def after_shard(former: ShardFigures, newer: ShardFigures) -> ShardFigures:
    """Of a shard that goes on in another process. Its updates are those of the parameters, which it has taken over."""
    added = _added(former, newer, _SHARD_SUMS, ("apply_s",))
    return msgspec.structs.replace(newer, **added, updates=max(former.updates, newer.updates))


LIVES = 4  # of a shard, whose last words may still be on their way


@dataclass(slots=True)
class Lives:
    """What a shard has counted in one process after another, by member and incarnation. Where it moves, the last word
    of the one may come after the first of the next, and it may come back to where it was and count from 0 again."""

    each: dict[tuple[str, int], ShardFigures] = field(default_factory=dict)  # the one heard last is the last
    over: ShardFigures = field(default_factory=ShardFigures)

    def told(self, life: tuple[str, int], figures: ShardFigures) -> None:
        known = self.each.pop(life, None)
        if known is not None and (figures.pushes < known.pushes or figures.pulls < known.pulls):
            self.over = after_shard(self.over, known)
        self.each[life] = figures
        while len(self.each) > LIVES:
            self.over = after_shard(self.over, self.each.pop(next(iter(self.each))))

    @property
    def together(self) -> ShardFigures:
        found = self.over
        for figures in self.each.values():
            found = after_shard(found, figures)
        return found


def _added(former: Any, newer: Any, sums: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    added: dict[str, Any] = {name: getattr(former, name) + getattr(newer, name) for name in sums}
    for name in classes:
        one, other = getattr(former, name), getattr(newer, name)
        added[name] = [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other
    return added


_SHARD_SUMS = (
    "pushes",
    "duplicates",
    "refused",
    "pulls",
    "received_bytes",
    "sent_bytes",
    "dense_received_bytes",
    "dense_sent_bytes",
    "apply_sum_s",
)
_SUMS = (
    "steps",
    "samples",
    "left_out",
    "step_sum_s",
    "staleness_sum",
    "sent_bytes",
    "received_bytes",
    "dense_sent_bytes",
    "dense_received_bytes",
    "cpu_s",
)


def none_yet(bounds: Sequence[float]) -> list[int]:
    """An empty count for each class."""
    return [0] * (len(bounds) + 1)


def count(classes: list[int], bounds: Sequence[float], value: float) -> None:
    """One more of this value. A value on a bound belongs to the class below, as Prometheus counts."""
    classes[bisect_left(bounds, value)] += 1
