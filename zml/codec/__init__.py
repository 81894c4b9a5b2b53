"""How a chunk travels: gradients up, deltas or parameters down.

A codec is told of one chunk at a time: its index, size and segments. It may keep what it learns about a
tensor from step to step (a threshold, a histogram), so that every worker, and every shard, has a codec of its
own; one codec serves one thread. Error feedback is the caller's memory: one float32 of residual per element,
for codecs that want it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from torch import Tensor

from ..layout import Chunk
from .dense import Bf16, Exact, NonFinite, read_parameters
from .frame import UNKNOWN, BadFrame, Buffer, Header, Kind, cut, parse, split

__all__ = [
    "CODECS",
    "UNKNOWN",
    "BadFrame",
    "Buffer",
    "Codec",
    "Header",
    "Kind",
    "NonFinite",
    "by_name",
    "cut",
    "parse",
    "read_parameters",
    "split",
]


class Codec(Protocol):
    """Tensors are float32, contiguous, on the CPU and as long as the chunk, unless said otherwise."""

    name: str
    id: int  # in the header of every frame
    lossless: bool  # workers hold exactly w: there are no deltas, and no residuals

    def bound(self, chunk: Chunk) -> int:
        """No gradient frame of this chunk has more bytes."""
        ...

    def place(self, chunk: Chunk, out: memoryview) -> Tensor | None:
        """The tensor inside `out` where a gradient frame keeps its values, if it keeps them as they are.

        Who gathers a gradient there, and then encodes it into the same `out`, has saved one copy.
        """
        ...

    def encode(
        self,
        chunk: Chunk,
        values: Tensor,
        residual: Tensor | None,
        out: memoryview,
        absent: Collection[int] = (),
    ) -> int:
        """Write the gradient frame of `values + residual` into `out`; returns its bytes.

        The residual then holds what the frame does not. Parameters in `absent` have no gradient in this step:
        their values are zeros, and their residual stays. Raises NonFinite (and the residual is untouched).
        """
        ...

    def check(self, chunk: Chunk, frame: Buffer) -> None:
        """Raise BadFrame unless this is a whole gradient frame of this chunk."""
        ...

    def view(self, chunk: Chunk, frame: Buffer) -> Tensor | None:
        """The gradient without a copy, where the frame holds it as it is; read only. Raises BadFrame."""
        ...

    def decode(self, chunk: Chunk, frame: Buffer, out: Tensor, add: bool) -> None:
        """Set `out` to the gradient, or add it. Raises BadFrame."""
        ...

    def total(self, chunk: Chunk, frames: Sequence[Buffer], out: Tensor) -> None:
        """Set `out` to the sum of several gradients, added in this order. Raises BadFrame."""
        ...

    def publish(self, chunk: Chunk, w: Tensor, p: Tensor, base: int, version: int) -> bytes:
        """The frame that brings replicas from `p` of version `base` towards `w`; `p` becomes what they will
        then hold.

        That is version `version`. Mostly a delta; where none can be given, the parameters themselves.
        """
        ...

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        """Add a delta from version `base` to `p`: the same bits as in `publish`. Raises BadFrame."""
        ...


CODECS: dict[str, Callable[[], Codec]] = {"none": Exact, "bf16": Bf16}


def by_name(name: str) -> Codec:
    """A new codec. Raises KeyError for a name that is not in CODECS."""
    return CODECS[name]()
