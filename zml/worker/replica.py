"""What a worker holds: the published parameters, at a version per chunk, and the model they are written into.

The rule: replicas of one version are the same to the bit, because all apply the same frames in the same
order. What the script does to its parameters between two steps never flows back by itself. With a lossless codec
the frames are the parameters, and the replica has no memory of its own unless it is asked to keep them.
"""

from collections.abc import Container, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..codec import UNKNOWN, BadFrame, Buffer, Codec, Kind, cut, parse, read_parameters
from ..layout import Chunk
from .binding import Binding


class Replica:
    """One worker's copy. `versions[chunk]` is what it holds of each chunk, UNKNOWN before the first pull."""

    def __init__(self, binding: Binding, codec: Codec, *, keep: bool = False) -> None:
        """`keep`: the script steps on the model itself, which is written by `restore` alone."""
        self.layout = binding.layout
        self.versions = [UNKNOWN] * len(self.layout.chunks)
        self._binding = binding
        self._codec = codec
        self._p: list[Tensor] = []  # per chunk; none with a lossless codec
        self._keep = keep
        if keep or not codec.lossless:
            self._p = [torch.zeros(chunk.size) for chunk in self.layout.chunks]

    def take(
        self, chunks: Sequence[int], versions: Sequence[int], counts: Sequence[int], payload: Buffer
    ) -> None:
        """Apply what a shard sent for a bucket: `counts[i]` frames bring the i-th chunk to `versions[i]`.

        Raises BadFrame; a chunk is then as it was, or at a version that was on the way to the new one.
        """
        if not len(chunks) == len(versions) == len(counts):
            raise BadFrame(f"{len(versions)} versions and {len(counts)} counts for {len(chunks)} chunks")
        frames = cut(payload, sum(counts))
        if len(frames) != sum(counts) or any(count < 0 for count in counts):
            raise BadFrame(f"{len(frames)} frames, not {sum(counts)}")
        at = 0
        for chunk, version, count in zip(chunks, versions, counts, strict=True):
            self.apply(chunk, version, frames[at : at + count])
            at += count

    def apply(self, chunk: int, version: int, frames: Sequence[Buffer]) -> None:
        """Bring one chunk to `version` and write it into the model. Raises BadFrame."""
        if not frames:
            if version != self.versions[chunk]:
                raise BadFrame(f"nothing leads chunk {chunk} from {self.versions[chunk]} to {version}")
            return
        if parse(frames[0]).kind == Kind.PARAMETERS:
            if len(frames) > 1:
                raise BadFrame(f"{len(frames) - 1} frames after the parameters of chunk {chunk}")
            values = read_parameters(self.layout.chunks[chunk], frames[0], version)
            if self._p:
                self._p[chunk].copy_(values)
        else:
            self._advance(self.layout.chunks[chunk], version, frames)
            values = self._p[chunk]
        if not self._keep:
            self._binding.write(chunk, values)
        self.versions[chunk] = version

    def held(self, chunk: int) -> Tensor:
        """The published parameters of a chunk, fp32; kept only if asked for, or where the codec has deltas."""
        return self._p[chunk]

    def keep_in(self, chunk: int, memory: Tensor) -> None:
        """Hold the published parameters of a chunk there from now on."""
        self._p[chunk] = memory.copy_(self._p[chunk])

    def restore(
        self,
        less: Mapping[int, Tensor] | None = None,
        *,
        frozen: bool = False,
        but: Container[int] = (),
    ) -> None:
        """Bring the model back to the published parameters, where the script steps on it; `less` is subtracted.

        Frozen ones are the script's own once it has them. The chunks `but` these stay as they are.
        """
        if not self._keep:
            return
        for chunk, values in enumerate(self._p):
            if chunk in but or (self.layout.frozen(chunk) and not frozen):
                continue
            self._binding.write(chunk, values, less.get(chunk) if less else None)

    def _advance(self, chunk: Chunk, version: int, frames: Sequence[Buffer]) -> None:
        if self._codec.lossless:
            raise BadFrame(f"a delta for chunk {chunk.index}, but the codec has none")
        bases = [parse(frame).version for frame in frames]
        way = [*bases, version]
        if bases[0] != self.versions[chunk.index] or any(a >= b for a, b in pairwise(way)):
            raise BadFrame(f"deltas of {bases} do not lead from {self.versions[chunk.index]} to {version}")
        for frame, base in zip(frames, bases, strict=True):
            self.versions[chunk.index] = base
            self._codec.advance(chunk, frame, self._p[chunk.index], base)
