"""Which elements of a parameter lie side by side in a bucket's memory: so much is copied at once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


class Run(NamedTuple):
    parameter: int
    start: int  # in the parameter, row-major
    at: int  # in the bucket's memory
    size: int


def joined(pieces: Iterable[Run]) -> tuple[Run, ...]:
    """The same in as few runs as possible; `pieces` are in the order of memory."""
    runs: list[Run] = []
    for piece in pieces:
        if runs:
            last = runs[-1]
            follows = piece.at == last.at + last.size and piece.start == last.start + last.size
            if follows and piece.parameter == last.parameter:
                runs[-1] = last._replace(size=last.size + piece.size)
                continue
        runs.append(piece)
    return tuple(runs)


def within(runs: Sequence[Run], places: Places) -> Iterator[tuple[int, Places]]:
    """Of places in memory, ascending: each run's parameter, and the positions in it that they are."""
    ends = np.searchsorted(places, [run.at + run.size for run in runs]).tolist()
    for run, first, last in zip(runs, [0, *ends], ends, strict=False):
        if first < last:
            yield run.parameter, places[first:last] - (run.at - run.start)
