"""Which elements of a bucket on a device leave: those that reach the threshold of their slice, and all of vectors.

In torch operations for any device; `picking_triton` does the same on CUDA. Here the host waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(slots=True)
class Entries:
    """What is sent. Positions count from the bucket's beginning and rise; `before` has the values, then the vectors."""

    finite: bool  # every element of the bucket is
    index: Tensor  # the positions, on the device
    before: Tensor  # on the device
    positions: Ints
    values: Floats
    vectors: Floats  # of all of them, in order


class Picker(Protocol):
    def __call__(self, total: Tensor, floors: Tensor, rooms: Ints) -> Entries:
        """The elements of `total` (float32, on the device) that are at least floors[their slice] large.

        At most sum(rooms) of them, one room for each slice. Where they are more each slice keeps to its own room, and
        those equal to the floor make way for larger ones.
        """
        ...


class TorchPicker:
    """`slice_of` has the slice of each element (int32), `vectors` the positions of what goes whole."""

    def __init__(self, slice_of: Tensor, vectors: Tensor) -> None:
        self._slice_of = slice_of
        self._vectors = vectors

    def __call__(self, total: Tensor, floors: Tensor, rooms: Ints) -> Entries:
        chosen = total.abs() >= floors.index_select(0, self._slice_of)
        index = torch.nonzero(chosen).view(-1)
        if len(index) > rooms.sum():
            index = fewer(index, total, self._slice_of, floors, rooms)
        before = torch.cat([total[index], total[self._vectors]])
        positions, host = index.cpu().numpy(), before.cpu().numpy().copy()
        finite = bool(torch.isfinite(total).all())
        return Entries(finite, index, before, positions, host[: len(positions)], host[len(positions) :])


def fewer(index: Tensor, total: Tensor, slice_of: Tensor, floors: Tensor, rooms: Ints) -> Tensor:
    """Of these positions what each slice has room for, larger ones than its floor first; rarely needed."""
    part, size = slice_of[index], total[index].abs()
    kept = []
    for at, room in enumerate(rooms.tolist()):
        above, equal = (index[(part == at) & mask] for mask in (size > floors[at], size == floors[at]))
        kept += [above[:room], equal[: max(0, room - len(above))]]
    return torch.cat(kept).sort().values


def picker(slice_of: Tensor, vectors: Tensor) -> Picker:
    """The best that there is for where these tensors live."""
    if slice_of.device.type == "cuda" and find_spec("triton"):
        from .picking_triton import TritonPicker

        return TritonPicker(slice_of, vectors)
    return TorchPicker(slice_of, vectors)
