"""How a chunk travels: gradients up, deltas or parameters down.

On a worker a codec makes one packer per bucket, which gathers, packs and keeps what a frame left behind (error
feedback, Seide et al., 2014; Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019). On a shard it reads
frames and publishes, chunk by chunk. Every worker and every shard has a codec of its own; it serves one thread.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..compression import parse as parse_spec
from ..layout import Chunk
from .behind import Behind
from .dense import Bf16, Exact, NonFinite, read_parameters
from .frame import UNKNOWN, BadFrame, Buffer, Header, Kind, cut, parse, split
from .runs import Places, Run

__all__ = [
    "UNKNOWN",
    "BadFrame",
    "Behind",
    "Buffer",
    "Codec",
    "Differing",
    "Header",
    "Kind",
    "NonFinite",
    "Packer",
    "Run",
    "by_name",
    "cut",
    "parse",
    "read_parameters",
    "split",
]


class Packer(Protocol):
    """One bucket's values on their way out of a worker. Owns the residual and the outgoing buffer.

    `values[chunk]` is where the caller gathers a chunk's gradient (or update) before it packs.
    """

    @property
    def values(self) -> Mapping[int, Tensor]: ...

    def pack(
        self, absent: Collection[int] = (), density: float | None = None, decay: float = 1.0
    ) -> memoryview:
        """The frames of all chunks, one after another; good until the next pack.

        The residual becomes values + decay * residual - what was sent. Parameters in `absent` have no gradient
        in this step: their values are zeros, nothing of them is sent, and their residual stays. `density` is
        the part of the elements to send, None for the codec's own; codecs that send all of them do without
        both numbers. Raises NonFinite, and then the residual is as before, up to rounding.
        """
        ...

    def take_back(self) -> None:
        """What was packed last does not count: the residual is as before, up to rounding. Of a difference it is not:
        it waits in the next one.

        The values must still be what they were.
        """
        ...

    def residual(self, chunk: int) -> Tensor | None:
        """What of a chunk has not left yet, float32; live. None where nothing ever waits."""
        ...

    def sent(self, chunk: int) -> Tensor | None:
        """Positions (int64, sorted) inside a chunk of the elements that the last pack chose; None where it did not
        choose, and sent all of them."""
        ...

    def differing(self) -> "Differing | None":
        """Itself, where it packs differences."""
        ...


class Differing(Packer, Protocol):
    """A packer for the difference between two states of a bucket: what did not leave is in the next difference again.

    Its memory lies side by side, so that whole parameters are copied at once: slabs of one layout, in which `runs` says
    what is where. All of them are live.
    """

    @property
    def runs(self) -> Sequence[Run]: ...

    def slabs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is subtracted from (the base), the values, the residual."""
        ...

    def by_chunk(self, slab: Tensor) -> Mapping[int, Tensor]:
        """Views of a slab."""
        ...

    def pack_difference(self, density: float | None = None) -> memoryview:
        """As `pack`, of base - values. The residual becomes what was not sent of it, whatever it was before. Raises
        NonFinite, and then it means nothing."""
        ...

    def give(self, slab: Tensor) -> None:
        """Add what the last pack has sent."""
        ...

    def places(self) -> Places:
        """Where in a slab the elements are that the last pack chose, in ascending order."""
        ...


class Codec(Protocol):
    """Tensors are float32, contiguous, on the CPU and as long as the chunk, unless said otherwise."""

    name: str
    id: int  # in the header of every frame
    lossless: bool  # workers hold exactly w: there are no deltas, and no residuals

    def packer(self, chunks: Sequence[Chunk]) -> Packer:
        """For one bucket."""
        ...

    def device_packer(self, chunks: Sequence[Chunk], device: str) -> Packer:
        """For one bucket whose gradients live on a GPU. Its `values` are there, too, or on the CPU."""
        ...

    def check(self, chunk: Chunk, frame: Buffer) -> None:
        """Raise BadFrame unless this is a whole gradient frame of this chunk."""
        ...

    def entries(self, chunk: Chunk, frame: Buffer) -> int:
        """Of how many elements a checked gradient frame speaks."""
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

    def publish(self, behind: Sequence[Behind]) -> list[bytes]:
        """For each of these chunks the frame that brings replicas from `p` of version `base` towards `w`; `p` becomes
        what they will then hold.

        That is version `version`. Mostly a delta; where none can be given, the parameters themselves. A codec
        that chooses sends about `budget` elements, or all that differ if they are fewer.
        """
        ...

    def advance(self, chunk: Chunk, frame: Buffer, p: Tensor, base: int) -> None:
        """Add a delta from version `base` to `p`: the same bits as in `publish`. Raises BadFrame."""
        ...


def by_name(text: str) -> Codec:
    """A new codec for what `--compress` says. Raises ValueError with a sentence for what it cannot say.

    `topk` compiles its kernels where no process on this machine has done so before: half a minute.
    """
    said = parse_spec(text)
    if said.kind == "auto":
        raise ValueError("'auto' is no codec: it is chosen by what a step and a link take")
    if said.kind == "none":
        return Exact()
    if said.kind == "bf16":
        return Bf16()
    from .sparse import TopK  # loads numba, which the others do without

    return TopK(said)
