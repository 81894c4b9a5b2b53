"""What jobs do with the workers they have: learn as it was measured, or count down.

A job that adapts measures itself as it runs, fits its profile to that alone, and takes the batch size that its profile
says is best. What is true (the measurements) and what the job believes (its profile) are kept apart: the scheduler
sees only beliefs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from ..scheduler.cluster.goodput import Batches, Learner, Seen, fit

CLOSE = 1e-9


class Model(Protocol):
    """What is true of a model: measured elsewhere (`measured`), or by zml (`curves`)."""

    @property
    def name(self) -> str: ...
    @property
    def asked(self) -> int:
        """The smallest batch size, all workers together: progress is counted in steps at it."""
        ...

    @property
    def most(self) -> int: ...
    @property
    def least_local(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    def progress(self, epoch: int) -> float:
        """Where so many epochs end."""
        ...

    def batches(self, fixed: int | None = None) -> Batches: ...
    def noise(self, batch: int, epoch: int) -> tuple[float, float]:
        """grad_sqr and grad_var at this batch size, in this epoch."""
        ...

    def step(self, placement: Sequence[int], batch: int) -> tuple[float, float]:
        """Step and sync time with so many workers on each node, at this local batch size."""
        ...


class Work(Protocol):
    """What one job has to do. `placement` is workers per node."""

    @property
    def asked(self) -> int:
        """Workers that its user asked for."""
        ...

    @property
    def done(self) -> bool: ...
    @property
    def profile(self) -> Learner | None: ...
    def place(self, placement: Sequence[int]) -> None:
        """It runs there from now on."""
        ...

    def run(self, placement: Sequence[int], seconds: float) -> float:
        """Work for so long, or until it is done; returns how long that was."""
        ...

    def alone_s(self) -> float:
        """How long all of it takes with what was asked for, undisturbed."""
        ...

    def left_s(self) -> float:
        """How much of that is left."""
        ...


@dataclass(slots=True)
class Countdown:
    """So many worker-seconds, whatever the workers are."""

    asked: int
    total_s: float
    """With as many workers as were asked for."""
    did_s: float = 0.0
    profile: Learner | None = None

    @property
    def done(self) -> bool:
        return self.did_s >= self.total_s - CLOSE * max(1.0, self.total_s)

    def place(self, placement: Sequence[int]) -> None:
        pass

    def run(self, placement: Sequence[int], seconds: float) -> float:
        rate = sum(placement) / self.asked
        used = min(seconds, (self.total_s - self.did_s) / rate)
        self.did_s += used * rate
        return used

    def alone_s(self) -> float:
        return self.total_s

    def left_s(self) -> float:
        return self.total_s - self.did_s


@dataclass(slots=True)
class Learning:
    """A training run of a measured model. `fixed`: the batch size that it always uses; None: it adapts."""

    model: Model
    asked: int
    """Workers that its user asked for, and at what batch size."""
    asked_batch: int
    adapts: bool
    fixed: int | None = None
    shards: int = 1
    noise: float = 0.0
    """Of what it measures of its own step times: the standard deviation of the logarithm."""
    random: Random = field(default_factory=lambda: Random(0))
    epoch: int = 0
    progress: float = 0.0
    at_once: int = 1
    accumulated: int = 0
    profile: Learner | None = None
    seen: dict[tuple[int, int, int], Seen] = field(default_factory=dict)
    _ahead: list[float] = field(default_factory=list, repr=False)

    @property
    def done(self) -> bool:
        return self.epoch >= self.model.epochs

    @property
    def batches(self) -> Batches:
        return self.model.batches(self.fixed)

    def place(self, placement: Sequence[int]) -> None:
        workers, nodes = sum(placement), len(placement)
        if self.fixed is not None:
            self.at_once, self.accumulated = self.batches.split(self.fixed, workers)
        elif self.profile is None:
            start = max(self.model.asked, self.model.least_local * workers)
            self.at_once, self.accumulated = self.batches.split(start, workers)
        else:
            choice = self.profile.best(workers, nodes)
            self.at_once, self.accumulated = choice.batch, choice.accumulated

    def run(self, placement: Sequence[int], seconds: float) -> float:
        left = seconds
        while left > 0 and not self.done:
            rate = self.rate(placement)
            ends = self.model.progress(self.epoch + 1)
            needs_s = max(0.0, ends - self.progress) / rate
            if needs_s > left:
                self.progress += rate * left
                return seconds
            left -= needs_s
            self.progress = max(self.progress, ends)
            self.epoch += 1
            if not self.done:
                self.place(placement)
        return seconds - left

    def rate(self, placement: Sequence[int]) -> float:
        """Progress a second, and what the job learns of itself."""
        workers = sum(placement)
        batch = workers * self.at_once * (self.accumulated + 1)
        step_s, sync_s = self.model.step(placement, self.at_once)
        sqr, var = self.model.noise(batch, self.epoch)
        if self.adapts:
            self.learn(workers, len(placement), step_s - sync_s, step_s, sqr, var)
        return gain(sqr, var, batch / self.model.asked) / (step_s + (step_s - sync_s) * self.accumulated)

    def learn(self, workers: int, nodes: int, grad_s: float, step_s: float, sqr: float, var: float) -> None:
        key = workers, nodes, self.at_once
        phi = self.model.asked * var / max(sqr, 1e-30)
        new = key not in self.seen
        if new:
            wrong = self.random.lognormvariate(0.0, self.noise) if self.noise else 1.0
            self.seen[key] = Seen(workers, nodes, self.at_once, grad_s * wrong, step_s * wrong)
        if self.profile is None or new:
            fitted = fit(list(self.seen.values()), self.shards)
            most = max(s.workers for s in self.seen.values())
            self.profile = Learner(fitted, phi, self.batches, most)
        elif phi != self.profile.phi:
            self.profile = Learner(self.profile.model, phi, self.profile.batches, self.profile.seen)

    def alone_s(self) -> float:
        return self.ahead()[0]

    def left_s(self) -> float:
        if self.done:
            return 0.0
        ends, begins = self.model.progress(self.epoch + 1), self.model.progress(self.epoch)
        share = (ends - self.progress) / (ends - begins) if ends > begins else 0.0
        now, then = self.ahead()[self.epoch : self.epoch + 2]
        return then + (now - then) * share

    def ahead(self) -> list[float]:
        """Seconds from the beginning of each epoch to the end of the last, with what the user asked for."""
        if not self._ahead:
            model = self.model
            full, more = divmod(self.asked, 4)
            placement = [4] * full + [more] * (more > 0)
            at_once, accumulated = model.batches().split(self.asked_batch, self.asked)
            step_s, sync_s = model.step(placement, at_once)
            total_s = step_s + (step_s - sync_s) * accumulated
            batch = self.asked * at_once * (accumulated + 1)
            sums = [0.0]
            for epoch in range(model.epochs - 1, -1, -1):
                worth = gain(*model.noise(batch, epoch), batch / model.asked)
                steps = max(0.0, model.progress(epoch + 1) - model.progress(epoch)) / worth
                sums.append(sums[-1] + steps * total_s)
            self._ahead = sums[::-1]
        return self._ahead


def gain(sqr: float, var: float, scale: float) -> float:
    """What a step is worth, in steps at the smallest batch size."""
    below = var / scale + sqr
    return (var + sqr) / below if below > 0 else 1.0
