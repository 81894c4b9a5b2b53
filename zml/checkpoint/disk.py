"""Every call by which a checkpoint reaches the disk, one method each, and what is made of them.

Rule: whatever writes below a `checkpoints` folder does so through a `Disk` that it was given. A test hands in one
that fails, stops or forgets at the n-th call, and so finds what would be left behind there.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

Buffer = bytes | bytearray | memoryview

AT_ONCE = 4 << 20  # bytes that are hashed and written together, while they are in the cache


class Written(NamedTuple):
    """A file that is on the disk, synced: its size and the xxh3_64 of its bytes, 16 hexadecimal digits."""

    bytes: int
    xxh3: str


class Disk:
    """The operating system itself. Each method is one call that may fail with OSError."""

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def open_folder(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def write(self, handle: int, data: Buffer) -> int:
        return os.write(handle, data)

    def fsync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)


DISK = Disk()


def write_all(disk: Disk, handle: int, data: Buffer) -> None:
    """All of it: one call may write less, and does so on a disk that is nearly full."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[disk.write(handle, rest) :]


def sync_folder(disk: Disk, path: Path) -> None:
    """What was made, renamed or removed in this folder is on the disk; fsync of the files alone does not say so."""
    handle = disk.open_folder(path)
    try:
        disk.fsync(handle)
    finally:
        disk.close(handle)


def pieces(data: Iterable[Buffer]) -> Iterator[memoryview]:
    for buffer in data:
        flat = memoryview(buffer)
        flat = flat.cast("B") if flat.nbytes else memoryview(b"")
        for at in range(0, len(flat), AT_ONCE):
            yield flat[at : at + AT_ONCE]


def write_file(disk: Disk, path: Path, data: Iterable[Buffer]) -> Written:
    """A new file, hashed as it is written, synced; beside its place and then renamed into it.

    So a file of this name is whole, and a second attempt at it does no harm. Where it fails nothing is left.
    """
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    digest, size = xxhash.xxh3_64(), 0
    handle = disk.create(scratch)
    try:
        try:
            for piece in pieces(data):
                digest.update(piece)
                write_all(disk, handle, piece)
                size += len(piece)
            disk.fsync(handle)
        finally:
            disk.close(handle)
        disk.rename(scratch, path)
    except Exception:
        with suppress(OSError):
            disk.unlink(scratch)
        raise
    return Written(size, digest.hexdigest())


def replace_file(disk: Disk, path: Path, data: bytes) -> None:
    """The same where a file of this name may be there; returns when the new one is what a crash would leave."""
    write_file(disk, path, [data])
    sync_folder(disk, path.parent)


def remove(disk: Disk, path: Path) -> None:
    """A file, or a folder with all in it; it may be gone already. Links are removed, never followed."""
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            disk.unlink(path)
            return
        for name in disk.listdir(path):
            remove(disk, path / name)
        disk.rmdir(path)


def free_bytes(path: Path) -> int | None:
    """What an ordinary user may still write where this path lies or would lie."""
    for folder in (path, *path.parents):
        try:
            found = os.statvfs(folder)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return None
