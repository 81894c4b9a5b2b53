"""Fewer points that look the same: of each stretch of a curve its lowest and its highest point are kept.

So a spike of one step in a hundred thousand is still there. The idea is M4's (Jugel et al., "M4: A
Visualization-Oriented Time Series Data Aggregation", VLDB 2014) without its first and last point of each stretch.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST = 1000  # points of a chart


def pick(columns: Sequence[Sequence[float | None]], most: int = MOST) -> list[int]:
    """Which rows to keep, in order: the first, the last, and of each stretch every column's extremes and its first gap
    (None). At most `most`, where that is as many as three for each column and two more."""
    count = len(columns[0]) if columns else 0
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // (3 * len(columns)))
    kept = {0, count - 1}
    for stretch in range(stretches):
        rows = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        for column in columns:
            there = [row for row in rows if column[row] is not None]
            if there:
                kept.add(min(there, key=lambda row: column[row] or 0.0))
                kept.add(max(there, key=lambda row: column[row] or 0.0))
            if len(there) < len(rows):
                kept.add(next(row for row in rows if column[row] is None))
    return sorted(kept)


def rounded(value: float | None, digits: int = 6) -> float | None:
    """To so many significant digits: nobody sees more, and JSON is half as long."""
    return None if value is None else float(f"{value:.{digits}g}")
