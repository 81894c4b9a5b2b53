"""Which of many positions are kept: the nearer to where things happen, the closer together.

Rule: behind any position there is one that is kept no further back than about three times the distance from there to
where things happen; so few are kept that their number grows with the logarithm of the distance (as the buckets of an
exponential histogram, Datar et al., "Maintaining stream statistics over sliding windows", 2002).
"""

from __future__ import annotations

from collections.abc import Iterable


def thinned(positions: Iterable[int], around: int) -> list[int]:
    """Those that stay, in ascending order. Twice is the same as once; `around` itself stays."""
    kept: dict[tuple[bool, int], int] = {}
    for position in sorted(positions, reverse=True):
        away = around - position
        kept[away < 0, abs(away).bit_length()] = position  # the lowest of each: it has the furthest to go
    return sorted(kept.values())
