"""How long a step takes with W workers and S shards: a formula, fitted to what was measured, and carried on.

    T(W, S) = compute + a + b W / S + link(W, S)

a is what one exchange costs anyway; b is what one worker's push and pull cost a shard that holds all parameters. A
shard serves all workers, each with 1 / S of the bytes, but with as many messages however few bytes are in them: further
out b / S becomes m + b / S, with m for the messages. link is what the bytes take on a shard's network card; on one
machine there is none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """Seconds. Of one machine, whose cores shards and workers share."""

    compute_s: float
    a: float
    b: float
    shards: int

    def step_s(self, workers: int) -> float:
        return self.compute_s + self.a + self.b * workers / self.shards


def fit(found: Mapping[int, float], compute_s: float, shards: int) -> Fit:
    """a and b, neither below 0, with the least sum of squared relative errors. `found`: seconds by workers."""
    points = [(workers / shards, seconds - compute_s, 1.0 / seconds**2) for workers, seconds in found.items()]
    total = sum(w for _, _, w in points)
    x, y = (sum(w * point[i] for *point, w in points) / total for i in (0, 1))
    spread = sum(w * (px - x) ** 2 for px, _, w in points)
    b = sum(w * (px - x) * (py - y) for px, py, w in points) / spread if spread else 0.0
    a = y - b * x
    if a < 0.0:
        a, b = 0.0, sum(w * px * py for px, py, w in points) / sum(w * px**2 for px, _, w in points)
    if b < 0.0:
        a, b = max(0.0, y), 0.0
    return Fit(compute_s, a, b, shards)


def errors(model: Fit, found: Mapping[int, float]) -> dict[int, float]:
    """Relative, of each point."""
    return {workers: model.step_s(workers) / seconds - 1.0 for workers, seconds in found.items()}


@dataclass(frozen=True)
class Far:
    """Shards that have a core and a network card of their own. Seconds, bytes, bytes a second."""

    compute_s: float
    a: float
    message_s: float  # m: CPU of a shard for each worker and step, however few bytes come
    bytes_s: float  # b: the same for a shard that holds all parameters, less m
    up: float  # of one worker and step, to all shards together
    down: float
    rate: float

    def step_s(self, workers: int, shards: int) -> float:
        link = workers * max(self.up, self.down) / (shards * self.rate)  # cards send and receive at once
        own = (self.up + self.down) / self.rate  # the worker's own card: first up, then down
        return self.compute_s + self.a + workers * (self.message_s + self.bytes_s / shards) + max(link, own)

    def efficiency(self, workers: int, shards: int) -> float:
        """Against one worker with one shard."""
        return self.step_s(1, 1) / self.step_s(workers, shards)


def split(cpu: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(m, b) from a shard's CPU seconds for each worker and step, with one shard and with S: m + b / S."""
    (one, most), (several, less) = cpu
    b = max(0.0, (most - less) / (1.0 / one - 1.0 / several))
    return max(0.0, most - b / one), b
