"""Files of float32 tensors in the safetensors format, written and read one tensor at a time.

The format: 8 bytes with the length of the header, the header (JSON: name -> dtype, shape, where its bytes begin and
end), then the bytes of all tensors without gaps. https://huggingface.co/docs/safetensors

It is written here by hand because the library wants all tensors at once and then makes one buffer of them, which is as
much memory again as the model; and it is read by hand because every length is held against the file's before
anything of that size is touched. The library reads what is written here, and the tests say so.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from ..errors import DISK_FULL, NOT_WRITTEN, ZmlError
from .disk import DISK, Buffer, Disk, Written, free_bytes, write_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_HEADER = 100_000_000  # bytes, the library's own limit
FULL = frozenset({28, 122})  # ENOSPC, EDQUOT
_METADATA = "__metadata__"
_KEY = re.compile(r"(0|[1-9]\d{0,8})/([A-Za-z_]\w{0,63})", re.ASCII)


class BadTensors(ValueError):
    """A file that is not such a file. The text says why, and begins in mid-sentence."""


class Placed(NamedTuple):
    """Where the bytes of a tensor lie in the data, which begin after the header."""

    shape: tuple[int, ...]
    begin: int
    end: int


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


# -- writing -----------------------------------------------------------------------------------------------


def header(described: Iterable[tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The first bytes of a file with these float32 tensors, and how many bytes of data must follow."""
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, shape in described:
        if name in entries or name == _METADATA:
            raise ValueError(f"a tensor cannot be called {name!r} here, or two of them are")
        end = at + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers lie at their natural addresses
    if len(text) > MOST_HEADER:
        raise ValueError(f"a header of {len(text)} bytes, more than {MOST_HEADER}")
    return len(text).to_bytes(8, "little") + text, at


def write_tensors(
    path: Path,
    described: Iterable[tuple[str, Sequence[int]]],
    data: Iterable[Buffer],
    metadata: Mapping[str, str],
    disk: Disk = DISK,
) -> Written:
    """A whole new file or none. `data` yields the bytes of the tensors in their order, one after another."""
    first, size = header(described, metadata)

    def everything() -> Iterable[Buffer]:
        given = 0
        yield first
        for buffer in data:
            given += memoryview(buffer).nbytes
            yield buffer
        if given != size:
            raise ValueError(f"{given} bytes of tensors, not {size}")

    try:
        return write_file(disk, path, everything())
    except OSError as error:
        raise not_written(error, path, len(first) + size) from error


def write_shard_file(
    path: Path,
    tensors: Mapping[str, "NDArray[np.float32] | Buffer"],
    metadata: Mapping[str, str],
    disk: Disk = DISK,
) -> Written:
    """Float32 tensors, C-contiguous, as arrays or (then one-dimensional) as bytes; none of them is copied.

    Hashed as it is written, synced, and renamed into its place: a shard may do it twice. Raises ZmlError if the disk
    does not take it; then there is no file.
    """
    described, views = _laid_out(tensors)
    return write_tensors(path, described, views, metadata, disk)


def _laid_out(
    tensors: Mapping[str, "NDArray[np.float32] | Buffer"],
) -> tuple[list[tuple[str, Sequence[int]]], list[memoryview]]:
    views = {
        name: memoryview(tensor) if isinstance(tensor, bytes | bytearray | memoryview) else tensor.data
        for name, tensor in tensors.items()
    }
    for name, view in views.items():
        if view.format not in ("f", "<f", "B", "b", "c") or not view.c_contiguous or view.nbytes % 4:
            raise ValueError(f"{name} is no C-contiguous float32")
    described: list[tuple[str, Sequence[int]]] = [
        (name, view.shape if view.itemsize == 4 and view.shape is not None else (view.nbytes // 4,))
        for name, view in views.items()
    ]
    return described, list(views.values())


def shard_metadata(versions: Mapping[int, int]) -> dict[str, str]:
    """What a shard's file says beside its tensors: of each of its chunks the version."""
    return {"versions": json.dumps({str(chunk): version for chunk, version in sorted(versions.items())})}


def shard_file(shard: int) -> str:
    return f"shard-{shard:04}.safetensors"


def not_written(error: OSError, path: Path, needed: int, at_least: bool = False) -> ZmlError:
    """What a person is told when a file cannot be written; of a full disk, how much was missing where."""
    if error.errno not in FULL:
        return ZmlError(
            NOT_WRITTEN,
            f"{path} could not be written: {error.strerror or error}",
            "Nothing else was touched. Look at the file system it lies on.",
        )
    free = free_bytes(path.parent)
    left = "" if free is None else f"; {free:,} are free there now"
    least = "at least " if at_least else ""
    wanted = f": {least}{needed:,} bytes were needed" if needed else ""
    return ZmlError(
        DISK_FULL,
        f"no room for {path}{wanted}{left}",
        "Free some space, or let `zml ckpt prune` delete old checkpoints; nothing that was there is touched.",
    )


# -- reading -----------------------------------------------------------------------------------------------


class Tensors(Protocol):
    """A file's tensors, wherever they are."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Placed]

    def array(self, name: str) -> "NDArray[np.float32]":
        """One of them, in its shape."""
        ...


class TensorFile:
    """One file, its header read and checked; the tensors are mapped when they are asked for.

    What was mapped stays good while somebody holds an array, even if the file is deleted meanwhile. Raises BadTensors
    and OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(handle).st_size
            length = int.from_bytes(_read(handle, 8, 0), "little")
            if length > min(MOST_HEADER, size - 8):
                raise BadTensors(f"has a header of {length} bytes in {size}")
            self._data = 8 + length
            self.metadata, self.tensors = parse_header(_read(handle, length, 8), size - self._data)
            self._map = mmap.mmap(handle, size, access=mmap.ACCESS_READ)
        finally:
            os.close(handle)

    def array(self, name: str) -> "NDArray[np.float32]":
        """Read-only, over the file itself."""
        import numpy as np

        assert self._map is not None
        placed = self.tensors[name]
        count = (placed.end - placed.begin) // 4
        if not count:
            return np.zeros(placed.shape, np.float32)
        flat = np.frombuffer(self._map, np.dtype("<f4"), count, self._data + placed.begin)
        return flat.reshape(placed.shape)


def _read(handle: int, count: int, at: int) -> bytes:
    found = os.pread(handle, count, at)
    if len(found) != count:
        raise BadTensors(f"ends at byte {at + len(found)}, inside its header")
    return found


def parse_header(text: bytes, size: int) -> tuple[dict[str, str], dict[str, Placed]]:
    """Metadata and tensors, in the order of their bytes, which fill `size` bytes of data. Raises BadTensors."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop(_METADATA, msgspec.Raw(b"{}")), type=dict[str, str])
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadTensors(f"has a header that cannot be read: {error}") from None
    found: dict[str, Placed] = {}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if entry.dtype != "F32" or any(extent < 0 for extent in entry.shape):
            raise BadTensors(
                f"has {name[:60]!r} as {entry.dtype[:20]}{entry.shape}, which is no float32 tensor"
            )
        if begin != at or end - begin != 4 * math.prod(entry.shape):
            raise BadTensors(f"has {name[:60]!r} at bytes {begin} to {end}, which does not fit")
        found[name] = Placed(tuple(entry.shape), begin, end)
        at = end
    if at != size:
        raise BadTensors(f"has {size} bytes of data, and its tensors {at}")
    return metadata, found


def by_chunk(file: Tensors) -> dict[int, dict[str, Placed]]:
    """The tensors of a shard's file under their chunks and names. Raises BadTensors."""
    found: dict[int, dict[str, Placed]] = {}
    for key, placed in file.tensors.items():
        read = _KEY.fullmatch(key)
        if read is None:
            raise BadTensors(f"has a tensor {key[:60]!r}, which is not called CHUNK/NAME")
        found.setdefault(int(read[1]), {})[read[2]] = placed
    return found


def versions(file: Tensors) -> dict[int, int]:
    """Of each chunk in a shard's file, its version. Raises BadTensors."""
    try:
        return msgspec.json.decode(file.metadata.get("versions", ""), type=dict[int, int])
    except msgspec.MsgspecError as error:
        raise BadTensors(f"does not say the versions of its chunks: {error}") from None
