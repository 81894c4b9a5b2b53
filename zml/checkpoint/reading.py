"""A checkpoint from disk: nothing of it is believed before it has been held against its manifest.

Rule: what does not verify does not exist. A reader says which file is wrong and how, and goes on to the one before.
Chunks are read from whichever shard's file has them, so that any number of shards can load any part.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import xxhash

from ..errors import BAD_CHECKPOINT, ZmlError
from ..layout import BadLayout, Registration
from .description import understand
from .disk import AT_ONCE
from .folder import JOB, LAYOUT, LEDGER, MANIFEST, SHARD, entries
from .manifest import MOST_BYTES as MOST_MANIFEST
from .manifest import BadManifest, File, Manifest, parse
from .tensors import BadTensors, TensorFile, Tensors, by_chunk, versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS = "w"
# Of `shard.optim.UpdateRule.state`; all else has a number per element.
PER_SEGMENT = frozenset({"step", "stepped"})
MOST_JSON = 1 << 30  # bytes of a ledger


class BadCheckpoint(ZmlError):
    """This folder is not a whole checkpoint."""

    def __init__(self, path: Path, file: str, what: str) -> None:
        super().__init__(
            BAD_CHECKPOINT,
            f"the checkpoint {path} is not usable: {file} {what}",
            "Take an older one; `zml ckpt verify` says which are whole.",
        )
        self.path = path
        self.file = file
        self.because = f"{file} {what}"


Identity = tuple[int, int, int, int, int]  # of a file: while it is the same, so are the bytes


class Skipped(NamedTuple):
    name: str
    because: str

    def __str__(self) -> str:
        return f"skipped {self.name}: {self.because}"


@dataclass(frozen=True)
class Checkpoint:
    """What was verified, and how to get at the rest."""

    path: Path
    manifest: Manifest
    registration: Registration = field(repr=False)
    layout: bytes = field(repr=False)  # layout.json as it is
    ledger: dict[str, Any] = field(repr=False)
    job: dict[str, Any] = field(repr=False)
    versions: dict[int, int] = field(repr=False)  # updates applied to each chunk
    holders: dict[int, Tensors] = field(repr=False)  # of each chunk the file that has it
    kinds: dict[int, tuple[str, ...]] = field(repr=False)  # of each chunk what is saved: w, exp_avg ...
    # Of each file that was held against it.
    seen: dict[str, Identity] = field(repr=False, default_factory=dict)

    def chunk(self, index: int) -> dict[str, "NDArray[np.float32]"]:
        """`w` and the optimizer's state of one chunk: read-only arrays over the file."""
        return {kind: self.holders[index].array(f"{index}/{kind}") for kind in self.kinds[index]}

    def check(self, chunks: Iterable[int]) -> None:
        """After a reading that was not deep: hold the files with these chunks against the manifest, byte for byte.

        Who loads a part need not read the whole. Raises BadCheckpoint.
        """
        names = set()
        for index in chunks:
            if index not in self.holders:
                raise BadCheckpoint(self.path, MANIFEST, f"lists no file with chunk {index}")
            names.add(self.holders[index].path.name)
        for name in sorted(names):
            _check(self.path, name, self.manifest.files[name])

    def file(self, name: str) -> Path | None:
        """Where a file of this checkpoint lies, `worker.safetensors` say; None if it has none of that name."""
        return self.path / name if name in self.manifest.files else None

    @property
    def parts(self) -> list[str]:
        """What is saved of parameters: w, then the optimizer's state by name."""
        return [WEIGHTS, *sorted({kind for kinds in self.kinds.values() for kind in kinds} - {WEIGHTS})]

    def parameter(self, index: int, part: str = WEIGHTS) -> "NDArray[np.float32] | None":
        """One part of one parameter, flat: `w`, or `exp_avg` and the like; `step` and `stepped` once per segment.

        Segments whose chunk has no such state yet are zeros, as in `shard.optim.UpdateRule.state`; None if none has.
        """
        import numpy as np

        places = self.registration.layout.places[index]
        if places and all(part not in self.kinds[chunk] for chunk, _ in places):
            return None
        found = []
        for chunk, segment in places:
            once = part in PER_SEGMENT
            if part not in self.kinds[chunk]:
                found.append(np.zeros(1 if once else segment.size, np.float32))
                continue
            values = self.holders[chunk].array(f"{chunk}/{part}")
            if once:
                at = self.registration.layout.chunks[chunk].segments.index(segment)
                found.append(values[at : at + 1])
            else:
                found.append(values[segment.offset : segment.offset + segment.size])
        if not found:
            return np.zeros(0, np.float32)
        return found[0] if len(found) == 1 else np.concatenate(found)


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, and that each file has the size that it lists; their bytes are not looked at."""
    try:
        with open(path / MANIFEST, "rb") as opened:
            manifest = parse(opened.read(MOST_MANIFEST + 1))
    except BadManifest as error:
        raise BadCheckpoint(path, MANIFEST, str(error)) from None
    except OSError as error:
        raise BadCheckpoint(path, MANIFEST, _unreadable(error)) from None
    for name, file in manifest.files.items():
        try:
            size = os.stat(path / name).st_size
        except OSError as error:
            raise BadCheckpoint(path, name, _unreadable(error)) from None
        if size != file.bytes:
            raise BadCheckpoint(path, name, f"has {size} bytes, the manifest lists {file.bytes}")
    return manifest


def read(path: Path, deep: bool = True) -> Checkpoint:
    """Raises BadCheckpoint. Not `deep`: the bytes of the tensors are taken on trust, everything else is checked."""
    return assemble(path, read_manifest(path), deep)


def assemble(path: Path, manifest: Manifest, deep: bool) -> Checkpoint:
    """The checkpoint in a folder, which this manifest describes. Raises BadCheckpoint."""
    seen = {
        name: _check(path, name, file)
        for name, file in sorted(manifest.files.items())
        if deep or not name.endswith(".safetensors")
    }
    description = _small(path, manifest, LAYOUT)
    try:
        registration = understand(description)
    except BadLayout as error:
        raise BadCheckpoint(path, LAYOUT, f"describes no model: {error}") from None
    if (registration.digest, registration.layout.size) != (manifest.layout, manifest.parameters):
        raise BadCheckpoint(path, LAYOUT, "describes another model than the one the manifest names")
    ledger, job = (_object(path, manifest, name) for name in (LEDGER, JOB))
    checkpoint = Checkpoint(path, manifest, registration, description, ledger, job, {}, {}, {}, seen)
    for name in sorted(filter(SHARD.fullmatch, manifest.files)):
        try:
            enter(checkpoint, TensorFile(path / name))
        except BadTensors as error:
            raise BadCheckpoint(path, name, str(error)) from None
        except OSError as error:
            raise BadCheckpoint(path, name, _unreadable(error)) from None
    missing = [chunk.index for chunk in registration.layout.chunks if chunk.index not in checkpoint.holders]
    if missing:
        count = len(missing)
        what = f"lists no file with chunk {missing[0]}" + (f" and {count - 1} more" if count > 1 else "")
        raise BadCheckpoint(path, MANIFEST, what)
    return checkpoint


def _check(path: Path, name: str, listed: File) -> Identity:
    try:
        seen = identity(path / name)
        found = hash_file(path / name)
    except OSError as error:
        raise BadCheckpoint(path, name, _unreadable(error)) from None
    if found != (listed.bytes, listed.xxh3):
        raise BadCheckpoint(
            path, name, f"has changed: its xxh3 is {found[1]}, the manifest lists {listed.xxh3}"
        )
    return seen


def identity(path: Path) -> Identity:
    """Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def enter(checkpoint: Checkpoint, file: Tensors) -> None:
    """Enter the chunks of one shard's file. Raises BadTensors if they are not chunks of this layout."""
    chunks = checkpoint.registration.layout.chunks
    held, known = by_chunk(file), versions(file)
    if held.keys() != known.keys():
        odd = min(held.keys() ^ known.keys())
        raise BadTensors(f"has chunk {odd} among its tensors or its versions, but not among both")
    for index, parts in held.items():
        if index >= len(chunks) or known[index] < 0:
            raise BadTensors(
                f"has chunk {index} at version {known[index]}, of a model with {len(chunks)} chunks"
            )
        if index in checkpoint.holders:
            raise BadTensors(f"has chunk {index}, and so has {checkpoint.holders[index].path.name}")
        if WEIGHTS not in parts:
            raise BadTensors(f"has no {WEIGHTS} of chunk {index}")
        for part, placed in parts.items():
            size = len(chunks[index].segments) if part in PER_SEGMENT else chunks[index].size
            if placed.shape != (size,):
                raise BadTensors(f"has {index}/{part} of shape {placed.shape}, not ({size},)")
        checkpoint.holders[index] = file
        checkpoint.versions[index] = known[index]
        checkpoint.kinds[index] = tuple(parts)


def newest(root: Path) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest that verifies, every byte of it; and which newer ones do not, and why."""
    skipped: list[Skipped] = []
    for checkpoint in whole(root, skipped):
        return checkpoint, skipped
    return None, skipped


def whole(root: Path, skipped: list[Skipped], deep: bool = True) -> Iterator[Checkpoint]:
    """All that verify, the newest first; the others are added to `skipped` as they are met."""
    for each in reversed(entries(root)):
        try:
            yield read(root / each.name, deep)
        except BadCheckpoint as error:
            skipped.append(Skipped(each.name, error.because))


def hash_file(path: Path) -> tuple[int, str]:
    """Size and xxh3_64. Read, not mapped: a bad sector is an error then and not a signal."""
    digest, size = xxhash.xxh3_64(), 0
    with open(path, "rb", buffering=0) as file:
        room = memoryview(bytearray(min(AT_ONCE, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(room):
            digest.update(room[:count])
            size += count
    return size, digest.hexdigest()


def _small(path: Path, manifest: Manifest, name: str) -> bytes:
    if name not in manifest.files:
        raise BadCheckpoint(path, MANIFEST, f"lists no {name}")
    if manifest.files[name].bytes > MOST_JSON:
        raise BadCheckpoint(path, name, f"has {manifest.files[name].bytes} bytes, more than {MOST_JSON}")
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise BadCheckpoint(path, name, _unreadable(error)) from None


def _object(path: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(_small(path, manifest, name), type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadCheckpoint(path, name, f"is no JSON object: {error}") from None


def _unreadable(error: OSError) -> str:
    return (
        "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror or error}"
    )
