"""The gradient noise scale, measured where gradients meet: how large a batch is worth its cost.

McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.1. With the true gradient G and the
covariance Sigma of one sample's gradient, a batch of B samples gives |g|^2 = |G|^2 + tr(Sigma) / B on average. In sync
every update has such norms at two sizes, b samples of one worker and n b of all n together:

    |G|^2      = (n b |mean|^2 - b each) / (n b - b)        each: the mean of the n workers' |g|^2
    tr(Sigma)  = (each - |mean|^2) / (1 / b - 1 / (n b))

and B_noise = tr(Sigma) / |G|^2, in samples. Batches much smaller than that lose little per sample, much larger ones
gain little per step; Pollux (Qiao et al., OSDI 2021) computes the efficiency of a batch from it.

Both are linear in the squared norms: what shards find for their own parameters adds up, and so do means over time. The
ratio is taken last, of smoothed values, because that of noisy ones would be biased. Here b counts as 1, a worker's
batch; who knows its size multiplies. Without two batches in one update there is nothing to compare, and nothing is
said.

The rule: measuring reads gradients and changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

WINDOW = 64  # measured updates: the mean of all up to here, from then on an exponential one of about so many
LEAST = 8  # with fewer, the ratio says nothing yet


class Norms(NamedTuple):
    """Of one update: squared norms of each worker's gradient, averaged, and of the mean gradient."""

    each: float
    mean: float


class Estimate(NamedTuple):
    """`square` is |G|^2, `variance` tr(Sigma) / b, both smoothed over `updates` measured updates."""

    updates: int
    square: float
    variance: float


NOTHING = Estimate(0, 0.0, 0.0)


def estimate(workers: int, norms: Norms) -> tuple[float, float]:
    """|G|^2 and tr(Sigma) / b from one update of two workers or more. Either may be negative, by chance."""
    square = (workers * norms.mean - norms.each) / (workers - 1)
    variance = (norms.each - norms.mean) / (1.0 - 1.0 / workers)
    return square, variance


def smoothed(before: Estimate, workers: int, norms: Norms) -> Estimate:
    """With one more update. One that is not finite says nothing."""
    if workers < 2 or not (math.isfinite(norms.each) and math.isfinite(norms.mean)):
        return before
    square, variance = estimate(workers, norms)
    weight = max(1.0 / (before.updates + 1), 1.0 / WINDOW)
    return Estimate(
        before.updates + 1,
        before.square + weight * (square - before.square),
        before.variance + weight * (variance - before.variance),
    )


def together(parts: Iterable[Estimate]) -> Estimate:
    """Of all shards; nothing while one of them has measured nothing."""
    known = list(parts)
    updates = min((part.updates for part in known), default=0)
    if not updates:
        return NOTHING
    return Estimate(updates, sum(part.square for part in known), sum(part.variance for part in known))


def scale(found: Estimate, batch_size: int) -> float | None:
    """B_noise in samples, for workers' batches of so many; None where that is not known (yet)."""
    if found.updates < LEAST or batch_size < 1 or found.square <= 0.0 or found.variance < 0.0:
        return None
    return batch_size * found.variance / found.square
