"""The chunks of a store as they were at one moment, copied while the store goes on.

To mark the moment copies nothing. A chunk is copied when whoever reads the snapshot comes to it, from any thread, or
right before the store changes it: whichever is first, and once. So the store never waits for more than the copy of the
chunk that it is about to change, or of the one that is being read.

Rule: whatever changes a chunk passes the door first (`Door.changes`, `Door.publishes`). There is no other way for a
snapshot to be right, and `test_snapshot` looks at every byte after every call of the store.

Memory: what changed before it was read is held twice until it is read, in the worst case all of the state; with each
further snapshot once more. Beyond that the door keeps up to KEPT bytes of warm buffers for the next time, for fresh
pages cost several times as much as the copies into them. A snapshot that is closed, or that nobody holds any more,
costs nothing.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..pages import Pages

KEPT = 64 << 20
READING = 16 << 20  # bytes of buffers that one reader uses again

Versions = dict[int, tuple[int, int, int]]  # (version, published, budget) by chunk


class Chunks(Protocol):
    """What a snapshot is of: float32 tensors, some for each chunk, always in the same order."""

    def sizes(self, chunk: int, *, published: bool) -> Mapping[str, int]:
        """Elements by name."""
        ...

    def parts(self, chunk: int, *, published: bool) -> Mapping[str, Tensor]:
        """The tensors themselves, live."""
        ...


class Copied(NamedTuple):
    """One chunk: its tensors lie one after another in `data`."""

    sizes: Mapping[str, int]
    data: memoryview

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        flat, at = np.frombuffer(self.data, np.float32), 0
        for name, size in self.sizes.items():
            yield name, torch.from_numpy(flat[at : at + size])
            at += size


class Snapshot:
    """Made by `Door.mark`. For one reader, who takes each chunk once."""

    def __init__(
        self, source: Chunks, versions: Versions, published: bool, lock: threading.Lock, pages: Pages
    ) -> None:
        self.versions = versions
        self.published = published  # is p in it, where that is not w?
        self.stalled_s = 0.0  # that the store waited for copies
        self._source = source
        self._lock = lock
        self._pages = pages  # for the store's thread
        self._reading = Pages(READING)
        self._pending = set(versions)
        self._copied: dict[int, Copied] = {}  # before they changed

    # -- for the reader ----------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Was a chunk taken?"""
        return len(self._pending) + len(self._copied) < len(self.versions)

    @property
    def bytes(self) -> int:
        return sum(4 * size for _, size in self.described())

    def described(self) -> list[tuple[str, int]]:
        """Names, "CHUNK/w" and so on, and elements of all tensors. Before the first chunk is taken."""
        return [
            (f"{chunk}/{name}", size) for chunk in self.versions for name, size in self._sizes(chunk).items()
        ]

    def take(self, chunk: int) -> Copied:
        """The reader's own, for as long as it holds a view of it."""
        with self._lock:
            copied = self._copied.pop(chunk, None)
            if copied is None:
                copied = self._copy(chunk, self._reading)
            return copied

    def data(self) -> Iterator[memoryview]:
        """The bytes of all tensors in the order in which they are described."""
        for chunk in self.versions:
            yield self.take(chunk).data

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for chunk in self.versions:
            for name, tensor in self.take(chunk).tensors():
                yield f"{chunk}/{name}", tensor

    def close(self) -> None:
        """Nothing of it is wanted any more. Twice is the same as once."""
        with self._lock:
            self._pending.clear()
            self._copied.clear()

    def _sizes(self, chunk: int) -> Mapping[str, int]:
        with self._lock:
            copied = self._copied.get(chunk)
            return self._source.sizes(chunk, published=self.published) if copied is None else copied.sizes

    # -- for the store -----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Is anything still to be copied?"""
        return bool(self._pending)

    def before(self, chunk: int) -> None:
        """The store is about to change this chunk."""
        if chunk not in self._pending:
            return
        began = time.perf_counter()
        with self._lock:
            if chunk in self._pending:  # else it was just read
                self._copied[chunk] = self._copy(chunk, self._pages)
        self.stalled_s += time.perf_counter() - began

    def _copy(self, chunk: int, pages: Pages) -> Copied:
        """Under the lock; numpy copies without Python's."""
        assert chunk in self._pending, f"chunk {chunk} was taken already"
        parts = self._source.parts(chunk, published=self.published)
        sizes = {name: part.numel() for name, part in parts.items()}
        data = pages.lend(4 * sum(sizes.values()))
        flat, at = np.frombuffer(data, np.float32), 0
        for name, part in parts.items():
            np.copyto(flat[at : at + sizes[name]], part.numpy())
            at += sizes[name]
        self._pending.discard(chunk)
        return Copied(sizes, data)


class Door:
    """A store's. In its thread."""

    def __init__(self, source: Chunks) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._pages = Pages(KEPT)
        self._marked: tuple[weakref.ref[Snapshot], ...] = ()

    def mark(self, versions: Versions, *, published: bool) -> Snapshot:
        """All chunks as they are now."""
        snapshot = Snapshot(self._source, versions, published, self._lock, self._pages)
        self._marked = (*self._waiting(), weakref.ref(snapshot))
        return snapshot

    def changes(self, chunks: Sequence[int]) -> None:
        """These chunks are about to change: parameters, optimizer state, anything."""
        if self._marked:
            self._before(chunks, publishing=False)

    def publishes(self, chunk: int) -> None:
        """The published parameters of this chunk are about to change, and nothing else."""
        if self._marked:
            self._before((chunk,), publishing=True)

    def _before(self, chunks: Sequence[int], *, publishing: bool) -> None:
        self._marked = self._waiting()
        for reference in self._marked:
            snapshot = reference()
            if snapshot is not None and (snapshot.published or not publishing):
                for chunk in chunks:
                    snapshot.before(chunk)

    def _waiting(self) -> tuple[weakref.ref[Snapshot], ...]:
        """Those that somebody holds and that are not whole."""
        return tuple(each for each in self._marked if (snapshot := each()) is not None and snapshot.waits)
