"""Which of many positions are kept: the nearer to where things happen, the closer together.

Rule: behind any position there is one that is kept no further back than three times the distance from there to where
things happen, and two steps more; and so few are kept that their number grows with the logarithm of the distance (as
the buckets of an exponential histogram, Datar et al., "Maintaining stream statistics over sliding windows", 2002).
"""

from __future__ import annotations

from collections.abc import Iterable


def thinned(positions: Iterable[int], around: int) -> list[int]:
    """Those that stay, in ascending order. Twice is the same as once; `around` itself stays."""
    buckets: dict[tuple[bool, int], list[int]] = {}
    for position in sorted(positions):
        away = around - position
        bucket = buckets.setdefault((away < 0, abs(away).bit_length()), [])
        # The ends: the lowest is the next to go into the bucket beyond, and the highest stays behind then.
        bucket[1:] = [position]
    return sorted({position for bucket in buckets.values() for position in bucket})
