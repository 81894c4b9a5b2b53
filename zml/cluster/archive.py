"""A folder of code as one file with a checksum: packed where a job is submitted, unpacked on the nodes.

The same content makes the same bytes: names in order, no times, no owners. Code travels, data does not: a folder that
is large is refused, and the largest files are named. What arrives is checked before anything is written, and may hold
only files, folders and links that stay within it; it appears under its name whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ARCHIVE, ZmlError
from ..text.tables import size as shown

MOST_BYTES = 100 * 10**6  # of a folder that is packed
MOST_FILES = 10_000
UNPACKED_BYTES = 1 << 30
UNPACKED_FILES = 50_000
LONGEST_READ = 1 << 20  # tarfile reads a header's extension in one go, as long as the header says
GIT_S = 60.0
NOT_CODE = frozenset({"__pycache__", "node_modules", "runs", "venv"})


# -- packing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive on this disk, for whoever made it to delete."""

    path: Path
    sha256: str
    names: list[str]
    bytes: int  # before compression
    left_out: list[str] = field(default_factory=list)  # what a reader might miss, with the reason


def pack(folder: Path, into: Path, most_bytes: int = MOST_BYTES, most_files: int = MOST_FILES) -> Packed:
    """Pack a folder into a new file in the folder `into`. Raises ZmlError."""
    left_out: list[str] = []
    try:
        names = sorted(name for name in listed(folder) if belongs(folder, name, left_out))
        sizes = {name: os.lstat(folder / name).st_size for name in names}
        check_size(folder, sizes, most_bytes, most_files)
        path = into / "archive.tar.gz"
        with path.open("wb") as file:
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as zipped:
                with tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for name in names:
                        add(tar, folder, name)
        return Packed(path, checksum(path), names, sum(sizes.values()), left_out)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise ZmlError(
            ARCHIVE, f"{folder} cannot be packed: {error.strerror or error}{where}", "Look at that file."
        ) from None


def listed(folder: Path) -> Iterator[str]:
    """The files of a folder that are worth sending: those that git knows, and new ones that it does not ignore;
    without git, those that are neither hidden nor made by a tool."""
    tracked = git(folder, "--cached", "--deduplicate")
    if tracked is None:
        yield from walked(folder)
        return
    yield from tracked
    others = set(git(folder, "--others", "--exclude-standard") or ()) - set(tracked)
    yield from (name for name in others if not NOT_CODE & set(PurePosixPath(name).parts))


def git(folder: Path, *which: str) -> list[str] | None:
    """Names that git lists, relative to the folder; None where there is no repository or no git."""
    try:
        ended = subprocess.run(
            ["git", "-C", str(folder), "-c", "core.fsmonitor=", "ls-files", "-z", *which],
            capture_output=True,
            timeout=GIT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        [os.fsdecode(name) for name in ended.stdout.split(b"\0") if name] if ended.returncode == 0 else None
    )


def walked(folder: Path) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and name not in NOT_CODE
            and not Path(where, name, "pyvenv.cfg").exists()
        ]
        links = [name for name in folders if Path(where, name).is_symlink()]
        for name in (*files, *links):
            if not name.startswith(".") and not name.endswith((".pyc", ".pyo")):
                yield Path(where, name).relative_to(folder).as_posix()


def belongs(folder: Path, name: str, left_out: list[str]) -> bool:
    """Whether it can be packed. What cannot is told, unless it is not there any more."""
    path = folder / name
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False  # git still knows it
    if stat.S_ISLNK(mode):
        target = os.readlink(path)
        if not stays_within(name, target):
            left_out.append(f"{name}: a link that leads out, to {target}")
            return False
        return True
    if stat.S_ISREG(mode):
        return True
    kind = "another repository" if stat.S_ISDIR(mode) else "neither file nor link"
    left_out.append(f"{name.rstrip('/')}: {kind}")
    return False


def stays_within(name: str, target: str) -> bool:
    """Whether a link called `name` to `target` leads to something in the same archive."""
    depth = len(PurePosixPath(name).parts) - 1
    if target.startswith("/") or not target:
        return False
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return False
    return True


def check_size(folder: Path, sizes: dict[str, int], most_bytes: int, most_files: int) -> None:
    total = sum(sizes.values())
    if total > most_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({shown(sizes[name])})" for name in largest)
        raise ZmlError(
            ARCHIVE,
            f"{folder} has {shown(total)} in {len(sizes):,} files; an archive takes {shown(most_bytes)}. "
            f"The largest: {named}",
            "Name what is data in .gitignore, or leave --archive out where all nodes see this folder.",
        )
    if len(sizes) > most_files:
        raise ZmlError(
            ARCHIVE,
            f"{folder} has {len(sizes):,} files; an archive takes {most_files:,}",
            "Name what is no code in .gitignore, or leave --archive out where all nodes see this folder.",
        )


def add(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    path = folder / name
    status = os.lstat(path)
    entry = tarfile.TarInfo(name)
    entry.mtime, entry.uid, entry.gid = 0, 0, 0
    if stat.S_ISLNK(status.st_mode):
        entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
        tar.addfile(entry)
        return
    entry.mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
    with path.open("rb") as file:
        entry.size = os.fstat(file.fileno()).st_size
        tar.addfile(entry, file)


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- unpacking -----------------------------------------------------------------------------------------------


def unpack(
    path: Path, sha256: str, into: Path, most_bytes: int = UNPACKED_BYTES, most_files: int = UNPACKED_FILES
) -> Path:
    """Make the folder `into` of an archive; returns it. A folder that is there was made by this before, and stays.
    Raises ZmlError, and then nothing is left of what was begun."""
    if into.exists():
        return into
    try:
        if checksum(path) != sha256:
            raise ZmlError(
                ARCHIVE,
                f"{path} is not the archive {sha256[:12]}...: its checksum differs",
                "Fetch it again.",
            )
        into.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
        try:
            with gzip.open(path) as zipped:
                extract(Bounded(zipped, most_bytes), begun, most_files)
            begun.chmod(0o755)
            put(begun, into)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise ZmlError(
            ARCHIVE, f"{path} cannot be unpacked: {error}", "Submit the job again, or look at the disk."
        ) from None
    return into


def extract(stream: Bounded, into: Path, most_files: int) -> None:
    """Raises ValueError where there is anything that has no place in an archive of code."""
    if not hasattr(tarfile, "data_filter"):  # Python 3.11.0 to 3.11.3, unless the distribution has mended it
        raise ValueError("this Python cannot unpack safely; 3.11.4 can")
    links: set[PurePosixPath] = set()
    with tarfile.open(fileobj=stream, mode="r:", errorlevel=1) as tar:
        for count, entry in enumerate(tar, 1):
            if count > most_files:
                raise ValueError(f"it has more than {most_files:,} entries")
            name = PurePosixPath(entry.name)
            if name.is_absolute() or ".." in name.parts or "\0" in entry.name:
                raise ValueError(f"it has an entry {entry.name[:100]!r}, which leads out of it")
            if not (entry.isreg() or entry.isdir() or entry.issym()):
                raise ValueError(f"{entry.name[:100]!r} is neither a file nor a folder nor a link")
            if links & {name, *name.parents}:
                raise ValueError(f"{entry.name[:100]!r} is behind a link")
            if entry.issym():
                if not stays_within(entry.name, entry.linkname):
                    raise ValueError(f"{entry.name[:100]!r} is a link that leads out of it")
                links.add(name)
            tar.extract(entry, into, set_attrs=not entry.issym(), filter="data")


def put(begun: Path, into: Path) -> None:
    """All of it on disk, then under its name; whoever was first has made the same."""
    for where, _, files in os.walk(begun):
        for name in (*(f for f in files if not Path(where, f).is_symlink()), "."):
            file = os.open(Path(where, name), os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
    try:
        os.rename(begun, into)
    except OSError:
        if not into.is_dir():
            raise


class Bounded(io.RawIOBase):
    """What is unpacked, up to a limit, and never much of it at once."""

    def __init__(self, stream: Any, most_bytes: int) -> None:
        self.stream = stream
        self.most_bytes = most_bytes

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= LONGEST_READ:
            raise ValueError("it has a header of an absurd length")
        self._check(self.stream.tell() + count - tarfile.RECORDSIZE)
        data: bytes = self.stream.read(count)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._check(offset - tarfile.RECORDSIZE)
        place: int = self.stream.seek(offset)
        return place

    def tell(self) -> int:
        place: int = self.stream.tell()
        return place

    def _check(self, place: int) -> None:
        if place > self.most_bytes:
            raise ValueError(f"it holds more than {shown(self.most_bytes)}")
