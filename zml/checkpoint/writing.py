"""A checkpoint onto the disk: whole and synced under its name, or not there at all.

Order: every file, synced; the folder; the manifest, synced, last; the folder again; only then the rename to a name that
readers look at, and the sync of what holds it. Whatever stops this on its way leaves a folder whose name begins
with a dot. Nothing that exists is ever written into or replaced, except LATEST; and by what came in pieces, a file of
that name which its sender had written here and thought better of.

One coordinator at a time writes below a run directory, and its lock keeps others out. So a partial folder whose name
has another process's token is a dead one's, and the next writer sweeps it; those of this process are
removed by their own writers. Each name is drawn at random and used once: who finds a folder of this name sees this very
disk, and a shard that still writes or sends for an abandoned attempt finds it gone, and never the next attempt.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import xxhash

from ..layout import Registration
from .description import describe
from .disk import (
    DISK,
    Buffer,
    Disk,
    Written,
    free_bytes,
    remove,
    replace_file,
    sync_folder,
    write_all,
    write_file,
)
from .folder import (
    JOB,
    LATEST,
    LAYOUT,
    LEDGER,
    MANIFEST,
    MOST_STEP,
    Entry,
    entries,
    hidden,
    hidden_name,
    is_file_name,
)
from .manifest import FORMAT, File, Manifest, parse, render
from .reading import assemble
from .tensors import not_written

PROCESS = os.urandom(4).hex()  # in the names of what this process has begun
MOST_FILES = 65_536
MOST_FILE = 1 << 44  # bytes


class Refused(ValueError):
    """What a member said of its file is not so. The writer is as before; the message names the file."""


class Gap(Refused):
    """A piece came before the one that it follows: it may come again."""


class _Stream(NamedTuple):
    """A file that arrives in pieces. Its bytes so far are written, and hashed, but not synced, under another name:
    whoever sends it may have begun to write it here before."""

    path: Path
    handle: int
    digest: xxhash.xxh3_64
    bytes: int


class Writer:
    """One checkpoint in the making. Not for several threads at once; every call may wait for the disk.

    Raises ZmlError where the disk does not take it, and has then abandoned the checkpoint. As a context manager it
    abandons what was not sealed.
    """

    def __init__(self, root: Path, step: int, disk: Disk = DISK) -> None:
        assert 0 <= step <= MOST_STEP
        self.root = root
        self.step = step
        self.folder = root / hidden_name(Entry(step).name, PROCESS, os.urandom(4).hex(), "partial")
        self.over = False  # sealed or abandoned
        self._disk = disk
        self._files: dict[str, File] = {}
        self._streams: dict[str, _Stream] = {}
        with self._writing(self.folder):
            if not root.is_dir():
                root.parent.mkdir(parents=True, exist_ok=True)
                disk.mkdir(root)
                sync_folder(disk, root.parent)
            sweep(root, disk)
            disk.mkdir(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.abandon()

    @property
    def bytes(self) -> int:
        """What it holds so far."""
        return sum(file.bytes for file in self._files.values()) + sum(s.bytes for s in self._streams.values())

    def must_have_room(self, size: int) -> None:
        """For so many bytes that are still to come: who must fail does so before others have begun."""
        with self._writing(self.folder, size):
            free = free_bytes(self.root)
            if free is not None and free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, name: str, data: Buffer) -> Written:
        """A whole file, from memory."""
        self._check_name(name)
        with self._writing(self.folder / name, memoryview(data).nbytes):
            written = write_file(self._disk, self.folder / name, [data])
        self._files[name] = File(*written)
        return written

    def piece(self, name: str, offset: int, data: Buffer) -> None:
        """The next bytes of a file that arrives bit by bit. What is there already is not written twice.

        Raises Gap if bytes before `offset` have not come yet.
        """
        if name in self._files:
            if offset + memoryview(data).nbytes <= self._files[name].bytes:
                return
            raise Refused(f"{name} is complete with {self._files[name].bytes} bytes, and more came")
        self._check_name(name)
        stream = self._streams.get(name)
        have = stream.bytes if stream is not None else 0
        flat = memoryview(data).cast("B")
        if not 0 <= offset <= have:
            raise Gap(f"{name} has {have} bytes, and the next piece begins at {offset}")
        if offset + len(flat) > MOST_FILE:
            raise Refused(f"{name} has more than {MOST_FILE} bytes")
        fresh = flat[have - offset :]
        with self._writing(self.folder / name, len(fresh)):
            if stream is None:
                path = self.folder / f".{name}.{os.urandom(4).hex()}"
                stream = _Stream(path, self._disk.create(path), xxhash.xxh3_64(), 0)
                self._streams[name] = stream
            write_all(self._disk, stream.handle, fresh)
        stream.digest.update(fresh)
        self._streams[name] = stream._replace(bytes=have + len(fresh))

    def adopt(self, name: str, size: int, xxh3: str) -> None:
        """A file is complete: one that a shard has written and synced itself, or one whose pieces have all come.

        Of the first the size is checked here, and its hash when the checkpoint is loaded; of the second both, now.
        Raises Refused.
        """
        said = File(size, xxh3)
        if self._files.get(name) == said:
            return
        self._check_name(name)
        if name in self._streams:
            self._finish(name, said)
        else:
            try:
                found = os.stat(self.folder / name).st_size
            except OSError as error:
                raise Refused(f"{name} cannot be seen from here: {error.strerror}") from None
            if found != size:
                raise Refused(f"{name} has {found} bytes here, not {size}")
        self._files[name] = said

    def _finish(self, name: str, said: File) -> None:
        stream = self._streams[name]
        found = File(stream.bytes, stream.digest.hexdigest())
        if found != said:
            raise Refused(
                f"of {name} came {found.bytes} bytes with xxh3 {found.xxh3}, not {said.bytes} with {said.xxh3}"
            )
        with self._writing(self.folder / name):
            self._disk.fsync(stream.handle)
            del self._streams[name]
            self._disk.close(stream.handle)
            self._disk.rename(stream.path, self.folder / name)

    def forget(self, name: str) -> None:
        """Go without a file, however much of it has come."""
        self._files.pop(name, None)
        stream = self._streams.pop(name, None)
        if stream is not None:
            with suppress(OSError):  # what is there of it is removed when the checkpoint is sealed
                self._disk.close(stream.handle)

    def seal(
        self,
        registration: Registration,
        *,
        ledger: Mapping[str, Any],
        job: Mapping[str, Any],
        epoch: int,
        because: str,
        now: float,
    ) -> Path:
        """Make it a checkpoint, and return its folder when a crash can take it away no more. `now` is Unix time.

        Raises BadCheckpoint if it could not be read again (a chunk is in no file, say), Refused if a file is not
        complete, and ValueError if JSON cannot say what is given (NaN, say); all abandon it.
        """
        try:
            return self._seal(registration, ledger, job, epoch, because, now)
        except Exception:
            self.abandon()
            raise

    def _seal(
        self,
        registration: Registration,
        ledger: Mapping[str, Any],
        job: Mapping[str, Any],
        epoch: int,
        because: str,
        now: float,
    ) -> Path:
        if self._streams:
            raise Refused(f"{min(self._streams)} is not complete")
        self.write(LAYOUT, describe(registration))
        self.write(LEDGER, json.dumps(ledger, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        self.write(JOB, json.dumps(job, allow_nan=False, indent=2).encode() + b"\n")
        attempt = max((each.attempt for each in entries(self.root) if each.step == self.step), default=0) + 1
        target = self.root / Entry(self.step, attempt).name
        manifest = Manifest(
            format=FORMAT,
            name=target.name,
            step=self.step,
            epoch=epoch,
            created=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            because=because,
            layout=registration.digest,
            parameters=registration.layout.size,
            files=dict(sorted(self._files.items())),
        )
        manifest = parse(render(manifest))
        assemble(self.folder, manifest, deep=False)  # nothing is sealed that cannot be read
        with self._writing(self.folder / MANIFEST):
            for name in self._disk.listdir(self.folder):
                if name not in self._files:  # half a file of a shard that began it twice
                    remove(self._disk, self.folder / name)
            sync_folder(self._disk, self.folder)
            write_file(self._disk, self.folder / MANIFEST, [render(manifest)])
            sync_folder(self._disk, self.folder)
            self._disk.rename(self.folder, target)
            self.over = True  # from here on it is a checkpoint, and nothing of it may be removed
            sync_folder(self._disk, self.root)
        with suppress(OSError):  # a hint only: the checkpoint is safe without it
            replace_file(self._disk, self.root / LATEST, f"{target.name}\n".encode())
        return target

    def abandon(self) -> None:
        """Remove what was written. After `seal`, or twice, it does nothing."""
        if self.over:
            return
        self.over = True
        for stream in self._streams.values():
            with suppress(OSError):
                self._disk.close(stream.handle)
        self._streams.clear()
        with suppress(
            OSError
        ):  # what stays has a name that no reader looks at, and the next process sweeps it
            remove(self._disk, self.folder)

    def _check_name(self, name: str) -> None:
        assert not self.over, "sealed or abandoned"
        if not is_file_name(name) or name == MANIFEST:
            raise Refused(f"a file of a checkpoint cannot be called {name[:60]!r}")
        if name in self._files:
            raise Refused(f"{name} is complete already")
        if len(self._files) + len(self._streams) >= MOST_FILES:
            raise Refused(f"more than {MOST_FILES} files")

    @contextmanager
    def _writing(self, path: Path, size: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needed = self.bytes + size
            self.abandon()
            raise not_written(error, path, needed, at_least=True) from error


def sweep(root: Path, disk: Disk = DISK) -> None:
    """Remove what other processes have begun here and will not end. What cannot be removed waits for the next time."""
    for name in disk.listdir(root):
        found = hidden(name)
        if (found is not None and found.process != PROCESS) or name.startswith(f".{LATEST}."):
            with suppress(OSError):
                remove(disk, root / name)
