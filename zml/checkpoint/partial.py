"""A part of a checkpoint whose bytes come from elsewhere: which of them some chunks need, and what is made of them.

It asks nobody: it says what it lacks, and is given that. Rule: the sizes of files are the manifest's, and memory is
taken for what a header says only when that has been held against them and against the model.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..layout import Registration
from .disk import Buffer
from .folder import MANIFEST, SHARD
from .manifest import Manifest
from .reading import BadCheckpoint, Checkpoint, enter
from .tensors import MOST_HEADER, BadTensors, Placed, parse_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LENGTH_BYTES = 8  # with which a file begins
MOST_PARTS = 16  # of one chunk: w and what an optimizer keeps


class Fragment:
    """A file of which some tensors are here."""

    def __init__(self, path: Path, data: int, metadata: dict[str, str], tensors: dict[str, Placed]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data  # where the tensors' bytes begin in the file
        self._here: dict[str, NDArray[np.float32]] = {}  # in the order of their bytes
        self._begins: list[int] = []  # in the file
        self._views: list[memoryview] = []

    def array(self, name: str) -> "NDArray[np.float32]":
        """Writable, and the caller's."""
        return self._here[name]

    def make_room(self, names: set[str]) -> None:
        import numpy as np

        for name, placed in self.tensors.items():
            if name in names and placed.end > placed.begin:
                array = self._here[name] = np.empty(placed.shape, np.dtype("<f4"))
                self._begins.append(self._data + placed.begin)
                self._views.append(array.data.cast("B"))
            elif name in names:
                self._here[name] = np.zeros(placed.shape, np.float32)

    def lacks(self, most: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of all that there is room for, neighbours together, `most` bytes at a time."""
        run, end = 0, -1
        for begin, view in zip(self._begins, self._views, strict=True):
            if begin != end:
                yield from _cut(run, end, most)
                run = begin
            end = begin + len(view)
        yield from _cut(run, end, most)

    def put(self, offset: int, data: Buffer) -> None:
        flat = memoryview(data).cast("B")
        while flat:
            place = bisect_right(self._begins, offset) - 1
            at = offset - self._begins[place]
            part = flat[: len(self._views[place]) - at]
            self._views[place][at : at + len(part)] = part
            flat, offset = flat[len(part) :], offset + len(part)


def _cut(begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, most):
        yield at, min(most, end - at)


class Part:
    """These chunks of the checkpoint that the manifest lists, for a model that is laid out like this.

    First every file of `names` is described, by its header; then what `lacks` says is `put`; then the chunks are in
    `checkpoint`. All raise BadCheckpoint.
    """

    def __init__(
        self, path: Path, manifest: Manifest, registration: Registration, chunks: Sequence[int]
    ) -> None:
        if manifest.parameters != registration.layout.size:
            what = f"is of a model with {manifest.parameters:,} parameters, not {registration.layout.size:,}"
            raise BadCheckpoint(path, MANIFEST, what)
        self.checkpoint = Checkpoint(path, manifest, registration, b"", {}, {}, {}, {}, {})
        self.chunks = chunks
        self._files: dict[str, Fragment] = {}

    @property
    def names(self) -> list[str]:
        return sorted(filter(SHARD.fullmatch, self.checkpoint.manifest.files))

    def size(self, name: str) -> int:
        return self.checkpoint.manifest.files[name].bytes

    def header_bytes(self, name: str, first: Buffer) -> int:
        """How many bytes of this file are its header, which begins like this."""
        length = int.from_bytes(memoryview(first)[:LENGTH_BYTES], "little")
        if len(first) < LENGTH_BYTES or length > min(MOST_HEADER, self.size(name) - LENGTH_BYTES):
            raise self._bad(name, f"has a header of {length} bytes in {self.size(name)}")
        return LENGTH_BYTES + length

    def describe(self, name: str, header: bytes) -> None:
        """This file begins with these bytes, and behind them its data do."""
        try:
            metadata, tensors = parse_header(header[LENGTH_BYTES:], self.size(name) - len(header))
            fragment = Fragment(self.checkpoint.path / name, len(header), metadata, tensors)
            enter(self.checkpoint, fragment)
        except BadTensors as error:
            raise self._bad(name, str(error)) from None
        self._files[name] = fragment

    def lacks(self, most: int) -> list[tuple[str, int, int]]:
        """(file, offset, bytes) of what the chunks need, and room for it."""
        needed: dict[str, set[str]] = {}
        for index in self.chunks:
            if index not in self.checkpoint.holders:
                raise self._bad(MANIFEST, f"lists no file with chunk {index}")
            name, kinds = self.checkpoint.holders[index].path.name, self.checkpoint.kinds[index]
            if len(kinds) > MOST_PARTS:
                raise self._bad(name, f"has {len(kinds)} tensors of chunk {index}")
            needed.setdefault(name, set()).update(f"{index}/{kind}" for kind in kinds)
        return list(self._ranges(needed, most))

    def _ranges(self, needed: Mapping[str, set[str]], most: int) -> Iterator[tuple[str, int, int]]:
        for name, tensors in sorted(needed.items()):
            self._files[name].make_room(tensors)
            for offset, count in self._files[name].lacks(most):
                yield name, offset, count

    def put(self, name: str, offset: int, data: Buffer) -> None:
        """Bytes that were lacking."""
        self._files[name].put(offset, data)

    def _bad(self, name: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(self.checkpoint.path, name, what)
