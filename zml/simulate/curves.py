"""What zml itself was measured to take: the curves that `bench/curves.py` writes and `zml simulate --curves` reads.

A file is one model: points of workers, shards and batch size with what a step took, the gradient noise scale, and how
much there is to train. The model of `scheduler.cluster.goodput` is fitted to it as it is to a job that runs: the
fastest computing at a batch size is the nearest to what it takes alone, the rest is exchange, a + b x workers / shards.
Whatever lies beyond the measured points is that formula, and the errors on the points say what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import BAD_TRACE, ZmlError
from ..scheduler.cluster.goodput import Batches, Seen, Throughput, fit

MOST_WORKERS = 64
Some = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Means over `steps` steps."""

    workers: Some
    nodes: Some = 1
    shards: Some
    batch: Some
    """Samples of one worker's step."""
    steps: Some
    step_s: Seconds
    compute_s: Seconds
    """Forward and backward, while the other processes were there."""
    wire_s: float
    """What the step waited for gradients to leave and parameters to come."""


class Curves(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str
    about: str
    """By what it was measured, and on what."""
    samples: Some
    """In an epoch."""
    epochs: Some
    noise: Seconds
    """The gradient noise scale, in samples."""
    points: Annotated[list[Point], msgspec.Meta(min_length=1)]


def read(path: Path) -> Calibrated:
    """Raises ZmlError."""
    try:
        return Calibrated(msgspec.json.decode(path.read_bytes(), type=Curves))
    except OSError as error:
        raise ZmlError(BAD_TRACE, f"{path} cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as bad:
        raise ZmlError(
            BAD_TRACE, f"{path} holds no curves: {bad}", "`bench/curves.py` writes them."
        ) from None


@dataclass(frozen=True)
class Calibrated:
    """A `work.Model`."""

    curves: Curves

    @property
    def name(self) -> str:
        return self.curves.model

    @cached_property
    def throughput(self) -> Throughput:
        """Of as many shards as most of the points have."""
        return fit([self.seen(point) for point in self.points], self.shards)

    @cached_property
    def shards(self) -> int:
        counts = [point.shards for point in self.curves.points]
        return max(set(counts), key=lambda count: (counts.count(count), count))

    @cached_property
    def points(self) -> list[Point]:
        return [point for point in self.curves.points if point.shards == self.shards]

    def seen(self, point: Point) -> Seen:
        alone = min(each.compute_s for each in self.points if each.batch == point.batch)
        return Seen(point.workers, point.nodes, point.batch, min(alone, point.step_s), point.step_s)

    def errors(self) -> list[float]:
        """Of the fit, relative, point by point."""
        model = self.throughput
        return [model.step_s(p.workers, p.nodes, p.batch) / p.step_s - 1.0 for p in self.points]

    def __str__(self) -> str:
        model, wrong = self.throughput, [abs(error) for error in self.errors()]
        line = model.together if any(p.nodes == 1 and p.workers > 1 for p in self.points) else model.apart
        computing = f"{model.grad.a * 1e3:.1f} + {model.grad.b * 1e3:.2f} x samples ms"
        exchange = f"{line.a * 1e3:.1f} + {line.b * 1e3:.1f} x workers/shards ms"
        return (
            f"{self.name}: computing {computing}, exchange {model.alone_s * 1e3:.1f} ms alone, else {exchange} "
            f"(overlap {model.gamma:g}); error on {len(wrong)} measured points "
            f"{sum(wrong) / len(wrong):.1%} on average, {max(wrong):.1%} at most"
        )

    # -- what a simulated job asks ---------------------------------------------------------------------------

    @property
    def asked(self) -> int:
        return min(point.batch for point in self.points)

    @property
    def most(self) -> int:
        return MOST_WORKERS * max(point.batch for point in self.points)

    @property
    def epochs(self) -> int:
        return self.curves.epochs

    @property
    def least_local(self) -> int:
        return self.asked

    def batches(self, fixed: int | None = None) -> Batches:
        return Batches(
            asked=self.asked,
            most=self.most,
            least_local=self.asked,
            most_local=max(point.batch for point in self.points),
            fixed=fixed,
        )

    def progress(self, epoch: int) -> float:
        """In steps at the smallest batch size."""
        return epoch * self.curves.samples / self.asked

    def noise(self, batch: int, epoch: int) -> tuple[float, float]:
        """As grad_sqr and grad_var at the smallest batch size: only their ratio counts."""
        return 1.0, self.curves.noise / self.asked

    def step(self, placement: Sequence[int], batch: int) -> tuple[float, float]:
        """Step and exchange."""
        step_s = self.throughput.step_s(sum(placement), len(placement), batch)
        return step_s, step_s - min(step_s, self.throughput.grad_s(batch))
