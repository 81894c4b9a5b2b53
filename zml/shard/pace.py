"""How a shard's updates are made and what is seen of them: with which learning rate, how late, how noisy, how often.

The rates themselves are in `rates`, the noise scale in `noise`; here both meet the store. What decides on a rate
belongs to the shard's state (`course`), and is kept with it; what is only observed begins anew with each process.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from ..figures import ShardFigures
from ..hyper import Hyper, scaled
from ..messages import Gauge
from ..noise import NOTHING, Estimate, smoothed
from ..rates import Course, Rule, why

if TYPE_CHECKING:
    from ..scheduler.ids import WorkerId
    from .counted import Committed
    from .store import Staged, Store

# A measured step costs up to a half more: 1.5 % of all steps at most (`python bench/noise.py`).
EVERY = 32
LASTS = 10  # updates with fewer steps than there are workers, after which some are thought to be gone
COUNTS = 64  # numbers of workers whose step times are kept
WINDOW = 64  # steps, and damped gradients, that are remembered

log = structlog.get_logger()


@dataclass(slots=True)
class Pace:
    """One shard's. In its thread."""

    shard: str
    rule: Rule = field(default_factory=Rule)
    course: Course = field(default_factory=Course)
    estimate: Estimate = NOTHING
    damped: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    times: dict[int, deque[float]] = field(default_factory=dict)  # seconds of steps, by number of workers
    counts: dict[int, int] = field(default_factory=dict)  # all that there were
    before: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # (epoch, workers, when)
    holders: int = 1  # shards with chunks: noise is the sum of what all of them see
    noise: bool = False  # is it wanted, and is what comes gradients?
    said: tuple[int, bool] = (0, False)  # (workers, is it warm-up?) of the newest `change`
    unsaid: int = 0  # updates since it was otherwise
    change: tuple[float, str] = (1.0, "")  # the factor, and why

    def begin(self, rule: Rule, course: Course, *, noise: bool, holders: int = 1) -> None:
        self.rule, self.course, self.noise, self.holders = rule, course, noise, holders

    def together(self, store: Store, clock: int, steps: Mapping[WorkerId, Committed]) -> int:
        """In sync: one update with the mean of these steps, in this order, and the numbers of the first one.
        Returns its epoch."""
        epoch = max(step.last.epoch for step in steps.values())
        hyper = next(iter(steps.values())).hyper
        if self.rule.scaling != "none":
            incarnations = {str(worker): step.last.incarnation for worker, step in steps.items()}
            self.course = self.course.next(self.rule, epoch, incarnations)
            hyper = scaled(hyper, self.course.factor)
            self._say()
        measured = self.noise and clock % EVERY == 0 and len(steps) > 1
        norms = store.apply([step.pushes for step in steps.values()], hyper, measure=measured)
        if norms is not None:
            self.estimate = smoothed(self.estimate, len(steps), norms)
        return epoch

    def alone(self, store: Store, pushes: Sequence[Staged], hyper: list[Hyper]) -> None:
        """Else: one update with one worker's step."""
        if self.rule.damping:
            staleness = max((store.missed(staged) for staged in pushes), default=0)
            factor = self.rule.damped(staleness)
            self.damped.append((staleness, factor))
            hyper = scaled(hyper, factor)
        store.apply([pushes], hyper)

    def observe(self, who: str, epoch: int, workers: int) -> None:
        """A step has ended just now, of this worker, or of all (``) together."""
        now = time.monotonic()
        before = self.before.get(who)
        self.before[who] = (epoch, workers, now)
        if before is not None and before[:2] == (epoch, workers):
            self.times.setdefault(workers, deque(maxlen=WINDOW)).append(now - before[2])
            self.counts[workers] = self.counts.get(workers, 0) + 1
            while len(self.times) > COUNTS:
                rarest = min((each for each in self.counts if each != workers), key=self.counts.__getitem__)
                del self.times[rarest], self.counts[rarest]

    def gauge(
        self, job: str, member: str, incarnation: int, updates: int, figures: ShardFigures | None = None
    ) -> Gauge:
        """For the coordinator."""
        course, damped = self.course, list(self.damped)
        return Gauge(
            job=job,
            member=member,
            incarnation=incarnation,
            shard=self.shard,
            updates=updates,
            factor=course.factor,
            because=why(self.rule, course),
            change=self.change,
            late=statistics.fmean(late for late, _ in damped) if damped else 0.0,
            damping=statistics.fmean(factor for _, factor in damped) if damped else 1.0,
            noise=self.estimate,
            holders=self.holders,
            step_times=[
                (workers, self.counts[workers], statistics.median(times))
                for workers, times in sorted(self.times.items())
            ],
            figures=figures,
        )

    def _say(self) -> None:
        """Where the rate has changed for good, and not because some had no batch left."""
        course, state = self.course, (self.course.workers, self.course.warming(self.rule))
        if state == self.said:
            self.unsaid = 0
            return
        self.unsaid += 1
        if course.workers == course.most or self.unsaid >= LASTS:
            self.said, self.unsaid = state, 0
            self.change = (course.factor, why(self.rule, course))
            log.info("learning rate", shard=self.shard, factor=course.factor, because=self.change[1])
