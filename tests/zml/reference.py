"""Exact Top-K, as slow and as plain as can be: what the sparse codec is held against."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def top_k(values: Floats, k: int) -> NDArray[np.int64]:
    """Positions of the k largest magnitudes, ascending; of equal ones the first. Zeros are never among them."""
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return np.sort(order[values[order] != 0])


def energy(values: Floats, positions: NDArray[np.int64]) -> float:
    """The part of the squared length that these elements hold."""
    squares = values.astype(np.float64) ** 2
    return float(squares[positions].sum() / squares.sum())
