"""The profile of a job that runs, from what its shards have seen of it.

Each worker's batch is the script's own, so more workers mean a larger batch in all: what that costs in learning, the
noise scale says where it was measured (`goodput`); where it was not, only throughput counts, and it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .goodput import Seen, Throughput, efficiency, fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """A `plan.Profile`."""

    model: Throughput
    batch: int
    """Samples of one worker's step."""
    base: int
    """Workers that the script's batch size and learning rate are meant for."""
    phi: float | None
    """The gradient noise scale in samples; None: not measured."""
    seen: int
    """The most workers that it ever ran with: no more is promised than for twice as many."""

    def goodput(self, workers: int, nodes: int) -> float:
        k = min(workers, 2 * self.seen)
        total = k * self.batch
        rate = total / self.model.step_s(k, min(nodes, k), self.batch)
        return rate if self.phi is None else rate * efficiency(self.phi, self.base * self.batch, total)


@dataclass(frozen=True, slots=True)
class Step:
    """How long a step took with so many workers."""

    workers: int
    step_s: float
    batch: int


def observe(
    steps: Sequence[Step], *, nodes: int, shards: int, base: int, phi: float | None
) -> Observed | None:
    """`nodes` that its workers are on now; the number for others that it had is taken to be as large, or one for each.
    None where nothing was seen yet."""
    known = [step for step in steps if step.batch > 0 and step.step_s > 0]
    if not known:
        return None
    # The fastest step ever is the nearest to what computing alone takes.
    grad_s = min(step.step_s for step in known)
    seen = [Seen(s.workers, min(nodes, s.workers), s.batch, min(grad_s, s.step_s), s.step_s) for s in known]
    return Observed(
        model=fit(seen, shards),
        batch=known[-1].batch,
        base=base,
        phi=phi,
        seen=max(step.workers for step in known),
    )
