"""The log files of a run, and their lines from any place in both directions. Memory: a block per file that is read.

A *source* is what one process writes: `w0.jsonl` and, of older text, `w0.jsonl.1`, `.2`, ... A *part* is one of these
files, known by its inode, for it is renamed while it is read. Text behind the last line feed of a part is no line yet.
Whoever writes there may be hostile: only regular files count, no link is followed, a line of any length costs a few
blocks.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 64 * 1024
LINE_MOST = 256 * 1024  # bytes; of a longer line only its length is told
NAME = re.compile(r"(?P<base>[^/]{1,200}\.jsonl)(?:\.(?P<number>\d{1,4}))?")
FOLDERS = re.compile(r"join-[^/]{1,100}")  # of machines that joined a run later
MOST_SOURCES = 20_000
LISTINGS = 5  # after the first, until it stood still between two


class Part(NamedTuple):
    path: Path
    inode: int
    size: int  # when it was looked at
    changed: float  # seconds since the Unix epoch


class Source(NamedTuple):
    """`key` is its path below the folder; `parts` are never empty, the oldest first. If it is not `settled`, its files
    were renamed whenever they were looked at, and some may lack."""

    key: str
    member: str
    parts: list[Part]
    settled: bool


class Raw(NamedTuple):
    """A line without its end; `text` is None if it is too long. It lies at `begin` to `end`, its line feed included."""

    begin: int
    end: int
    text: bytes | None


def sources(folder: Path) -> list[Source]:
    """All of a `logs` folder, by name.

    Files are looked at one after the other while they are renamed, and what one listing says may never have been so at
    any one time, without a gap to tell by. What two listings say alike was so between them; where a number is lacking,
    a file may have been on its way from one name to the next, and they are to say so all the time.
    """
    found = _listed(folder)
    settled: dict[str, list[tuple[int, Part]]] = {}
    for left in reversed(range(LISTINGS)):
        before, found = found, _listed(folder)
        for key in found.keys() - settled.keys():
            alike = _shape(before.get(key, [])) == _shape(found[key])
            if alike and (left == 0 or not _lacks(found[key])):
                settled[key] = found[key]
        if found.keys() <= settled.keys():
            break
    return [
        Source(
            key,
            member_of(key),
            [part for _, part in sorted(parts, key=lambda each: -each[0])],
            key in settled,
        )
        for key, parts in sorted({**found, **settled}.items())
    ]


def _listed(folder: Path) -> dict[str, list[tuple[int, Part]]]:
    found: dict[str, list[tuple[int, Part]]] = {}
    for prefix, path in [("", folder), *_inside(folder)]:
        for name, about in _regular(path):
            match = NAME.fullmatch(name)
            if match is not None and len(found) < MOST_SOURCES:
                number = int(match["number"] or 0)
                part = Part(path / name, about.st_ino, about.st_size, about.st_mtime)
                found.setdefault(prefix + match["base"], []).append((number, part))
    return found


def _shape(parts: list[tuple[int, Part]]) -> list[tuple[int, int]]:
    return sorted((number, part.inode) for number, part in parts)


def _lacks(parts: list[tuple[int, Part]]) -> bool:
    """Is there a gap in their numbers? The newest text may not have been begun yet."""
    numbers = sorted(number for number, _ in parts)
    return numbers[0] > 1 or numbers[-1] - numbers[0] >= len(numbers)


def member_of(key: str) -> str:
    """Whose file it is: "w0" of "w0.jsonl", "w0.script.jsonl" and "w0.out.jsonl"."""
    stem = key.rpartition("/")[2].removesuffix(".jsonl")
    for suffix in (".script", ".out", ".log"):
        stem = stem.removesuffix(suffix)
    return stem


def _inside(folder: Path) -> list[tuple[str, Path]]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if FOLDERS.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [(f"{name}/", folder / name) for name in sorted(names)]


def _regular(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    try:
                        yield entry.name, entry.stat(follow_symlinks=False)
                    except OSError:
                        continue  # gone meanwhile
    except OSError:
        return


def read(part: Part, begin: int, size: int) -> bytes:
    """Less at its end; empty if it is gone. Opened each time: a run may have more files than a process may open."""
    for path in _names(part):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            about = os.fstat(file)
            if about.st_ino == part.inode and stat.S_ISREG(about.st_mode):
                return os.pread(file, size, begin)
        except OSError:
            continue
        finally:
            os.close(file)
    return b""


def _names(part: Part) -> Iterator[Path]:
    """What it was called, then what it is called now: it may be renamed, and that while it is looked for."""
    yield part.path
    for _ in range(LISTINGS):
        try:
            with os.scandir(part.path.parent) as entries:
                names = [entry.name for entry in entries if entry.inode() == part.inode]
        except OSError:
            return
        yield from (part.path.with_name(name) for name in names)


def is_there(part: Part) -> bool:
    """It can be read up to the end that it had."""
    return part.size == 0 or bool(read(part, part.size - 1, 1))


def end_of(part: Part) -> int:
    """Where its last whole line ends."""
    place = part.size
    while place > 0:
        begin = max(0, place - BLOCK)
        found = read(part, begin, place - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        place = begin
    return 0


def backward(part: Part, end: int) -> Iterator[Raw]:
    """Whole lines before `end`, which must be the end of one, the last first."""
    tail = b""  # of the line that ends at `end`, what lies behind `place`
    place = end
    while place > 0:
        begin = max(0, place - BLOCK)
        block = read(part, begin, place - begin)
        if len(block) < place - begin:
            return  # it was cut short
        cut = len(block)  # what is behind it was told
        look = cut - 1 if place == end else cut  # but for the line's own feed
        while (found := block.rfind(b"\n", 0, look)) >= 0:
            first = begin + found + 1
            yield _raw(first, end, block[found + 1 : cut] + tail)
            tail, end, cut, look = b"", first, found + 1, found
        tail = block[:cut] + tail if end - begin <= LINE_MOST else b""
        place = begin
    if end > 0:
        yield _raw(0, end, tail)


def forward(part: Part, begin: int) -> Iterator[Raw]:
    """Whole lines from `begin` on, up to what the file holds by then."""
    rest = b""  # of the line that begins at `begin`
    place = begin
    while block := read(part, place, BLOCK):
        at = 0
        while (found := block.find(b"\n", at)) >= 0:
            end = place + found + 1
            yield _raw(begin, end, rest + block[at : found + 1])
            rest, begin, at = b"", end, found + 1
        place += len(block)
        rest = rest + block[at:] if place - begin <= LINE_MOST else b""


def _raw(begin: int, end: int, text: bytes) -> Raw:
    return Raw(begin, end, text[:-1] if end - begin <= LINE_MOST else None)
