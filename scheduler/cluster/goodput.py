"""How fast does a job learn with so many workers? Throughput times statistical efficiency: Qiao et al., "Pollux:
Co-adaptive Cluster Scheduling for Goodput-Optimized Deep Learning", OSDI 2021, with the parameter server's term of
synchronisation in place of the ring's.

    T_grad(m)    = a + b m                          m samples at once, on one worker
    T_sync(K, N) = c + d K / S                      K workers on N nodes against S shards: one pair (c, d) for workers
                                                    that share a node, one for those that do not; c alone for K = 1
    T_step       = s T_grad + (T_grad^g + T_sync^g)^(1/g)       s batches accumulated before; 1 <= g <= 10: overlap
    THROUGHPUT   = M / T_step,                  M = K m (s + 1)
    EFFICIENCY   = (phi + M0) / (phi + M)       phi: gradient noise scale, M0: the batch that was asked for
    GOODPUT      = THROUGHPUT x EFFICIENCY      useful samples a second, at the best m and s

The seven numbers are fitted to what the job has run, in closed form but for g, which is tried on a grid: a fit costs
well under a millisecond. What has not been seen is assumed to cost nothing (Pollux' priors), so that it is tried: half
of the only batch size's time is constant, d is 0 before three workers have been seen, nodes apart are a tenth slower
than nodes together. Against too much hope, no more is promised of several nodes than for twice the workers that were
ever seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, exp, log

GAMMAS = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
GAMMA_COST = 1e-3  # of Pollux' loss: the fit prefers little overlap where it explains as much
APART = 1.1  # what the network costs against one node, before it was seen
BATCHES_TRIED = 24
TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Seen:
    """One configuration that ran, and what a step took."""

    workers: int
    nodes: int
    batch: int
    """Samples at once on one worker."""
    grad_s: float
    """Forward and backward of one such batch."""
    step_s: float
    """The same and the exchange with the shards."""


@dataclass(frozen=True, slots=True)
class Line:
    """a + b x."""

    a: float = 0.0
    b: float = 0.0

    def at(self, x: float) -> float:
        return self.a + self.b * x


def regress(points: Sequence[tuple[float, float, float]]) -> Line:
    """The line of least weighted squares with neither number negative; points are (x, y, weight). Where all x are
    one, it is level."""
    w = sum(p[2] for p in points)
    mean_x = sum(p[0] * p[2] for p in points) / w
    mean_y = sum(p[1] * p[2] for p in points) / w
    var = sum(p[2] * (p[0] - mean_x) ** 2 for p in points)
    if var <= TINY * w * max(1.0, mean_x * mean_x):
        return Line(max(0.0, mean_y))
    b = sum(p[2] * (p[0] - mean_x) * (p[1] - mean_y) for p in points) / var
    a = mean_y - b * mean_x
    if b < 0:
        return Line(max(0.0, mean_y))
    if a < 0:
        return Line(0.0, sum(p[0] * p[1] * p[2] for p in points) / sum(p[0] * p[0] * p[2] for p in points))
    return Line(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """The model of a step's time."""

    grad: Line
    alone_s: float = 0.0
    together: Line = Line()
    """Of workers per shard, all workers on one node."""
    apart: Line = Line()
    gamma: float = 1.0
    shards: int = 1

    def grad_s(self, batch: float) -> float:
        return self.grad.at(batch)

    def sync_s(self, workers: int, nodes: int) -> float:
        if workers == 1:
            return self.alone_s
        return (self.apart if nodes > 1 else self.together).at(workers / self.shards)

    def step_s(self, workers: int, nodes: int, batch: float, accumulated: int = 0) -> float:
        grad = self.grad.at(batch)
        return accumulated * grad + norm(grad, self.sync_s(workers, nodes), self.gamma)


def norm(x: float, y: float, gamma: float) -> float:
    """(x^g + y^g)^(1/g) without overflow."""
    high, low = (x, y) if x >= y else (y, x)
    if gamma == 1.0 or low <= 0.0:
        return high + low if gamma == 1.0 else high
    return float(high * (1.0 + (low / high) ** gamma) ** (1.0 / gamma))


def rest(whole: float, part: float, gamma: float) -> float:
    """y of whole = norm(part, y)."""
    if whole <= part:
        return 0.0
    return float(whole * (1.0 - (part / whole) ** gamma) ** (1.0 / gamma))


def fit(seen: Sequence[Seen], shards: int = 1) -> Throughput:
    """The model that explains these best; there is at least one. Errors count in proportion (Pollux: RMSLE)."""
    grad = fit_grad(seen)
    groups: tuple[list[Seen], list[Seen], list[Seen]] = ([], [], [])
    for s in seen:
        groups[0 if s.workers == 1 else 1 if s.nodes == 1 else 2].append(s)
    three = any(s.workers > 2 for s in seen)

    def sync(group: list[Seen], gamma: float) -> Line | None:
        if not group:
            return None
        points = [
            (s.workers / shards if three else 1.0, rest(s.step_s, s.grad_s, gamma), s.step_s**-2)
            for s in group
        ]
        return regress(points)

    best: tuple[float, Throughput] | None = None
    for gamma in GAMMAS:
        alone, together, apart = (sync(group, gamma) for group in groups)
        together = together or Line()
        model = Throughput(
            grad=grad,
            alone_s=alone.a if alone else 0.0,
            together=together,
            apart=apart or Line(together.a * APART, together.b * APART),
            gamma=gamma,
            shards=shards,
        )
        errors = [log(max(model.step_s(s.workers, s.nodes, s.batch), TINY) / s.step_s) ** 2 for s in seen]
        loss = (sum(errors) / len(errors)) ** 0.5 + GAMMA_COST * (gamma - 1.0) ** 2
        if best is None or loss < best[0]:
            best = loss, model
    assert best is not None
    return best[1]


def fit_grad(seen: Sequence[Seen]) -> Line:
    if len({s.batch for s in seen}) == 1:
        half = sum(s.grad_s for s in seen) / len(seen) / 2
        return Line(half, half / seen[0].batch)
    return regress([(float(s.batch), s.grad_s, s.grad_s**-2) for s in seen])


# -- what may be chosen ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Which batch sizes a job may use: all workers' together, and at once on one worker."""

    asked: int
    """M0: the one it was tuned for; never fewer."""
    most: int
    least_local: int = 1
    most_local: int
    fixed: int | None = None
    """Always this one, whatever would be best."""

    def split(self, batch: float, workers: int) -> tuple[int, int]:
        """Samples at once on one worker, and how many such batches are accumulated before the one that is pushed.
        One worker alone accumulates at least one: it takes two gradients to tell noise from signal."""
        local = ceil(batch / workers - 1e-8)
        accumulated = max(0, ceil(local / self.most_local - 1e-8) - 1)
        if workers == 1 and local > self.asked:
            accumulated = max(1, accumulated)
        at_once = ceil(local / (accumulated + 1) - 1e-8)
        return min(at_once, max(1, self.most // (workers * (accumulated + 1)))), accumulated

    @property
    def most_workers(self) -> int:
        return max(1, (self.fixed or self.most) // self.least_local)


def efficiency(phi: float, asked: float, batch: float) -> float:
    """What one sample of a batch teaches, of what it would teach in the batch that was asked for."""
    return (phi + asked) / (phi + batch)


@dataclass(frozen=True, slots=True)
class Choice:
    goodput: float
    batch: int
    accumulated: int


@dataclass(slots=True)
class Learner:
    """A job's profile: its model, its noise, its batch sizes, and how many workers it was ever seen with."""

    model: Throughput
    phi: float
    batches: Batches
    seen: int = 1
    _best: dict[tuple[int, int], Choice] = field(default_factory=dict, repr=False)

    def goodput(self, workers: int, nodes: int) -> float:
        bound = self.batches.most_workers if nodes == 1 else min(2 * self.seen, self.batches.most_workers)
        return self.best(min(workers, bound), nodes).goodput

    def best(self, workers: int, nodes: int) -> Choice:
        """The batch size that teaches most in a second."""
        key = workers, min(nodes, 2)
        found = self._best.get(key)
        if found is None:
            found = self._best[key] = self._search(workers, nodes)
        return found

    def _search(self, workers: int, nodes: int) -> Choice:
        batches, model, phi = self.batches, self.model, self.phi
        found = Choice(-1.0, 1, 0)
        sync = model.sync_s(workers, nodes)
        for batch in self._sizes(workers):
            at_once, accumulated = batches.split(batch, workers)
            grad = model.grad.at(at_once)
            total = workers * at_once * (accumulated + 1)
            step = accumulated * grad + norm(grad, sync, model.gamma)
            goodput = total / max(step, TINY) * efficiency(phi, batches.asked, total)
            if goodput > found.goodput:
                found = Choice(goodput, at_once, accumulated)
        return found

    def _sizes(self, workers: int) -> Iterable[float]:
        if self.batches.fixed is not None:
            return (self.batches.fixed,)
        low = max(self.batches.asked, self.batches.least_local * workers)
        high = max(low, self.batches.most)
        step = log(high / low) / (BATCHES_TRIED - 1)
        return (low * exp(step * i) for i in range(BATCHES_TRIED))
