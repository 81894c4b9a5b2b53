"""Which checkpoints may go, and how they go.

Rule: the newest stays, and so does the newest that is known to be whole, whatever was asked for. A folder that
goes loses its name first, so that nobody takes half of it for a checkpoint.
"""

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from .disk import DISK, Disk, remove, sync_folder
from .folder import Entry, entries, hidden, hidden_name
from .reading import whole
from .writing import PROCESS


def to_drop(
    checkpoints: Iterable[Entry], keep_last: int, keep_every_steps: int, verified: Collection[Entry]
) -> list[Entry]:
    """Those that nothing keeps, the oldest first.

    The newest `keep_last` stay; and of every `keep_every_steps` (0: none) steps the first, the same one however often
    this is asked; and the newest of all, and the newest that verified. Where none is known to verify, none goes.
    """
    assert keep_last >= 0 and keep_every_steps >= 0
    there = sorted(set(checkpoints))
    known = [each for each in there if each in verified]
    if not known:
        return []
    kept = {there[-1], known[-1], *there[len(there) - min(keep_last, len(there)) :]}
    if keep_every_steps:
        first: dict[int, Entry] = {}
        for each in there:
            if each.step >= keep_every_steps:
                first.setdefault(each.step // keep_every_steps, each)
        kept.update(first.values())
    return [each for each in there if each not in kept]


def prune(
    root: Path,
    keep_last: int,
    keep_every_steps: int = 0,
    verified: Collection[Entry] | None = None,
    disk: Disk = DISK,
) -> list[str]:
    """Delete what `to_drop` says; returns the names. A job may run meanwhile, and prune itself.

    `verified`: those that the caller knows to be whole; None: they are read from the newest on until one is. OSError if
    the disk refuses.
    """
    if verified is None:
        verified = newest_whole(root)
    if not root.is_dir():
        return []
    drop = to_drop(entries(root), keep_last, keep_every_steps, verified)
    hiding = []
    for each in drop:
        away = root / hidden_name(each.name, PROCESS, os.urandom(4).hex(), "dropped")
        with suppress(FileNotFoundError):  # somebody else was faster
            disk.rename(root / each.name, away)
            hiding.append(away)
    if hiding:
        sync_folder(disk, root)
    left_over = [
        root / found.name
        for name in disk.listdir(root)
        if (found := hidden(name)) and found.kind == "dropped"
    ]
    for away in {*hiding, *left_over}:
        remove(disk, away)
    return [each.name for each in drop]


def newest_whole(root: Path) -> set[Entry]:
    """The newest that verifies, every byte; empty if none does."""
    names = {each.name: each for each in entries(root)}
    for checkpoint in whole(root, []):
        return {names[checkpoint.path.name]}
    return set()
