"""Which buckets a shard gets that joins a running job, and from whom.

A newcomer takes from whoever holds the most until it would hold more than that one, and nothing else moves: about
1 / (n + 1) of the parameters, which is the least that makes n + 1 shards equal (Karger et al., STOC 1997). A bucket
moves as a whole. What comes next depends on where everything is now, and on nothing else, so it does not matter who
asks, nor whether what was asked for before came about.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Portion(NamedTuple):
    """Buckets that go from one shard to another at one cut. Shards are numbers."""

    buckets: tuple[int, ...]
    source: int
    target: int

    def applied_to(self, holders: Sequence[int]) -> list[int]:
        """Who holds each bucket afterwards."""
        return [self.target if bucket in self.buckets else holder for bucket, holder in enumerate(holders)]


def next_portion(
    holders: Sequence[int], weights: Sequence[int], newcomers: Collection[int], most: int
) -> Portion | None:
    """What is to move next; None where everybody has a fair share.

    `holders[bucket]` is the shard that holds it, `weights[bucket]` what it weighs. A portion weighs `most` at most, or
    is one bucket. Nothing is taken from a shard's last bucket.
    """
    if not newcomers:
        return None
    load = dict.fromkeys({*holders, *newcomers}, 0)
    held: dict[int, list[int]] = {shard: [] for shard in load}
    for bucket, shard in enumerate(holders):
        load[shard] += weights[bucket]
        held[shard].append(bucket)
    target = min(newcomers, key=lambda shard: (load[shard], shard))
    taken: list[int] = []
    source: int | None = None
    while (found := _next(load, held, weights, target)) is not None:
        fullest, bucket = found
        if source not in (None, fullest):
            break
        if taken and sum(weights[each] for each in (*taken, bucket)) > most:
            break
        source = fullest
        taken.append(bucket)
        held[fullest].remove(bucket)
        load[fullest] -= weights[bucket]
        load[target] += weights[bucket]
    return None if source is None else Portion(tuple(sorted(taken)), source, target)


def _next(
    load: dict[int, int], held: dict[int, list[int]], weights: Sequence[int], target: int
) -> tuple[int, int] | None:
    """The largest bucket of the fullest shard that leaves the newcomer with less than that one had."""
    for shard in sorted(load, key=lambda shard: (-load[shard], shard)):
        if shard == target or len(held[shard]) < 2:
            continue
        fitting = [bucket for bucket in held[shard] if load[target] + weights[bucket] < load[shard]]
        if fitting:
            return shard, max(fitting, key=lambda bucket: (weights[bucket], bucket))
    return None
