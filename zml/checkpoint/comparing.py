"""What differs between two checkpoints, parameter by parameter, under the names that the model gives them.

The layouts may differ: chunks are a matter of where numbers lie, and the same name and shape is the same parameter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .reading import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Difference:
    """One part of one parameter: `w`, or an optimizer's state by name. The numbers may be not finite.

    `only` says "a" or "b" where the other has nothing to compare, "shape" where the shapes differ; the numbers are then
    NaN.
    """

    parameter: str
    part: str
    elements: int
    equal: bool  # to the bit
    largest: float  # max |a - b|
    relative: float  # ||a - b|| / ||a||
    only: str = ""


def diff(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """In the order of a's parameters, then those that only b has. Reads as it goes, one parameter at a time."""
    places = {p.name: i for i, p in enumerate(b.registration.layout.parameters)}
    parts = [*a.parts, *(part for part in b.parts if part not in a.parts)]
    for index, parameter in enumerate(a.registration.layout.parameters):
        other = places.pop(parameter.name, None)
        same_shape = other is not None and b.registration.layout.parameters[other].shape == parameter.shape
        for part in parts:
            first = a.parameter(index, part)
            second = b.parameter(other, part) if other is not None and same_shape else None
            if first is not None and second is not None:
                if len(first) != len(second):  # once per segment, and the segments differ
                    first, second = first[:1], second[:1]
                yield compare(parameter.name, part, first, second)
            elif first is not None or second is not None:
                why = "shape" if other is not None and not same_shape else "a" if second is None else "b"
                yield Difference(parameter.name, part, parameter.size, False, math.nan, math.nan, why)
    for name, index in places.items():
        size = b.registration.layout.parameters[index].size
        for part in b.parts:
            if b.parameter(index, part) is not None:
                yield Difference(name, part, size, False, math.nan, math.nan, "b")


def compare(parameter: str, part: str, a: "NDArray[np.float32]", b: "NDArray[np.float32]") -> Difference:
    import numpy as np

    if np.array_equal(a.view(np.uint32), b.view(np.uint32)):
        return Difference(parameter, part, a.size, True, 0.0, 0.0)
    with np.errstate(all="ignore"):
        apart = a.astype(np.float64) - b
        largest = float(np.abs(apart).max())
        size = float(np.linalg.norm(a.astype(np.float64)))
        away = float(np.linalg.norm(apart))
    return Difference(
        parameter, part, a.size, False, largest, away / size if size else math.inf if away else 0.0
    )
