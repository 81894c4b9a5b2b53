"""What has happened, on disk, before anybody hears of it: a coordinator's journal, and snapshots that shorten it.

A folder holds `records`, each a msgpack array (kind, time, fields), and snapshots: `NUMBER.snapshot` stands for all
records before that number. The state is the newest whole snapshot and the records from there on. Two snapshots are
kept, so that one may be damaged; records that both stand for are deleted.

Rules. What could not be written, because the disk is full, waits here in order, and until it is written nothing that
follows from it may leave the process: ask `settled`. One process at a time holds the folder, by flock(2) for as long
as it lives; on NFS the server keeps the lock where both machines mount it with locking (the default since version 4),
and nobody does under `nolock`. A process that is killed loses nothing; a machine that dies may lose what `sync` had
not been called for.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from .errors import HELD, JOURNAL, ZmlError
from .hold import hold
from .records import Damaged, Records, numbered, read
from .scheduler.plain import NotPlain

SNAPSHOT_BYTES = 2 << 20  # of records, about a second of reading: then the next snapshot is due
MAGIC = b"zml-snap"
HEAD = struct.Struct("<8sQI")  # magic, bytes of the body, CRC-32 of the body
SUFFIX = ".snapshot"
KEPT = 2  # snapshots
RULE = "one coordinator at a time goes on with it"
HISTORY = "history"  # the records before them

log = structlog.get_logger()


class Entry(NamedTuple):
    """One record. `where` names it for people."""

    kind: str
    time: float
    fields: dict[str, Any]
    where: str


class Journal:
    """See the module. Belongs to one thread, but for `sync` and `write_snapshot`. `trouble` says why something waits to
    be written."""

    def __init__(
        self,
        folder: Path,
        *,
        snapshot_bytes: int = SNAPSHOT_BYTES,
        held_already: bool = False,
        flag: str = "--run-dir",
    ) -> None:
        """Opens or creates. Raises ZmlError: another process holds it, it is damaged, it cannot be written.

        `held_already`: nobody but this process comes to write here, for another lock keeps them out: a file less to
        keep open for each job. `flag`: by which people choose the folder.
        """
        self.folder = folder
        self.snapshot_bytes = snapshot_bytes
        self.trouble = ""
        self.dirty = False  # something was written since the last sync
        self._owed: deque[bytes] = deque()
        try:
            fix = f"Wait for it, end it, or give this one another {flag}."
            self._lock = -1
            if not held_already:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = hold(folder, HELD, RULE, fix)
        except OSError as error:
            raise ZmlError(
                JOURNAL, f"cannot write to {folder}: {error.strerror}", f"Choose another {flag}."
            ) from None
        try:
            self._records = Records(folder)
            self._since = self._records.bytes  # bytes of records since the newest snapshot; at most too many
        except Damaged as damaged:
            self._let_go()
            raise self.unusable(str(damaged)) from None
        except OSError as error:
            self._let_go()
            raise self.unusable(f"{folder} cannot be read: {error}") from None
        if self._records.torn_bytes:
            what = "the process ended while it wrote; nobody was told of it"
            log.warning("journal cut", folder=str(folder), bytes=self._records.torn_bytes, because=what)

    def unusable(self, what: str) -> ZmlError:
        fix = f"Bring {self.folder} back from a copy; or move it away, and the job begins anew."
        return ZmlError(JOURNAL, what, fix)

    # -- reading -------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Nothing was ever written."""
        return self._records.next == 0

    def snapshot(self) -> tuple[Any, int]:
        """The newest whole snapshot, None where there is none, and the number of the first record after it."""
        damage = ""
        for number, path in reversed(_snapshots(self.folder)):
            try:
                state = _read(path)
            except (Damaged, OSError, msgspec.DecodeError) as error:
                damage = str(error)
                log.warning("snapshot passed over", because=damage)
                continue
            return state, number
        if self._records.first > 0:
            what = damage or f"{self.folder} has no snapshot of what was before record {self._records.first}"
            raise self.unusable(what)
        return None, 0

    def replay(self, start: int) -> Iterator[Entry]:
        """The records from this number on. Raises ZmlError that names the record."""
        try:
            for number, body in self._records.replay(start):
                where = f"record {number} of {self.folder}"
                try:
                    kind, at, fields = msgspec.msgpack.decode(body, type=tuple[str, float, dict[str, Any]])
                except msgspec.MsgspecError as bad:
                    raise self.unusable(f"{where} cannot be read: {bad}") from None
                yield Entry(kind, at, fields, where)
        except Damaged as damaged:
            raise self.unusable(str(damaged)) from None

    def read_back(self, restore: Callable[[Any], float], replay: Callable[[Entry], None]) -> float:
        """Hand the newest snapshot to `restore`, which says of when it is, and each record after it to `replay`;
        returns when the last one was written. Raises ZmlError that names what cannot be used."""
        state, number = self.snapshot()
        at = 0.0
        if state is not None:
            try:
                at = restore(state)
            except (NotPlain, msgspec.MsgspecError, KeyError, TypeError) as bad:
                raise self.unusable(f"the snapshot of {self.folder} cannot be used: {bad}") from None
        for entry in self.replay(number):
            try:
                replay(entry)
            except (NotPlain, msgspec.MsgspecError) as bad:
                raise self.unusable(f"{entry.where} ({entry.kind}) cannot be used: {bad}") from None
            except (AssertionError, LookupError) as bad:
                what = f"{entry.where} ({entry.kind}) does not follow from those before it: {bad!r}"
                raise self.unusable(what) from None
            at = entry.time
        return at

    # -- writing -------------------------------------------------------------------------------------

    def write(self, kind: str, at: float, fields: dict[str, Any]) -> None:
        """Write a record, now or as soon as there is room: see `settled`."""
        self._owed.append(msgspec.msgpack.encode((kind, at, fields)))
        self.settled()

    def settled(self) -> bool:
        """Is everything written? Tries to write what is not."""
        while self._owed:
            try:
                self._records.append(self._owed[0])
            except OSError as error:
                if not self.trouble:
                    log.error("journal stuck", folder=str(self.folder), because=str(error))
                self.trouble = f"the journal in {self.folder} cannot be written: {error.strerror or error}"
                return False
            self._since += len(self._owed.popleft())
            self.dirty = True
        if self.trouble:
            log.info("journal written again", folder=str(self.folder))
            self.trouble = ""
        return True

    def withdraw(self) -> None:
        """The newest record waits for room and is not to be written any more: what it says did not happen."""
        self._owed.pop()

    @property
    def long(self) -> bool:
        """Would a snapshot be of use? Only of a state in which every record is."""
        return self._since >= self.snapshot_bytes and not self._owed

    def shorten(self, state: Any) -> None:
        """`state`, plain data, stands for all records so far. A disk without room for it is no harm."""
        if (number := self.begin_snapshot()) is not None and self.write_snapshot(number, state):
            self.drop_old()

    def begin_snapshot(self) -> int | None:
        """The state as it is now may be written under this number, while others go on to write records; None: not now,
        for the disk has no room."""
        self._since = 0
        try:
            return self._records.begin_segment()
        except OSError as error:
            self._no_snapshot(error)
            return None

    def write_snapshot(self, number: int, state: Any) -> bool:
        """`state`, plain data, stands for all records before this number. May be called from another thread."""
        try:
            _write(self.folder / f"{number:020d}{SUFFIX}", msgspec.msgpack.encode(state))
        except OSError as error:
            self._no_snapshot(error)
            return False
        return True

    def drop_old(self) -> None:
        """What the newest snapshots stand for is not needed any more to go on."""
        try:
            kept = _snapshots(self.folder)
            # But records prove what became of the data.
            self._records.drop_before(kept[-KEPT:][0][0] if len(kept) >= KEPT else 0, self.folder / HISTORY)
            for _, path in kept[:-KEPT]:
                path.unlink()
        except OSError as error:
            self._no_snapshot(error)

    def _no_snapshot(self, error: OSError) -> None:
        log.warning("no snapshot", folder=str(self.folder), because=str(error))

    def sync(self) -> None:
        """What was written before survives the machine. May be called from another thread."""
        self.dirty = False
        try:
            self._records.sync()
        except OSError as error:
            log.error("journal not synced", folder=str(self.folder), because=str(error))

    def close(self) -> None:
        self._records.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def history(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and fields of every record that was ever written, also while a coordinator writes. Raises Damaged, and
    ValueError that names a record which cannot be read."""
    for number, body in read(folder / HISTORY, folder):
        try:
            kind, _, fields = msgspec.msgpack.decode(body, type=tuple[str, float, dict[str, Any]])
        except msgspec.MsgspecError as bad:
            raise ValueError(f"record {number} of {folder} cannot be read: {bad}") from None
        yield kind, fields


def _snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Numbers and files, the oldest first."""
    return [
        (number, path) for number, path in numbered(folder, SUFFIX) if re.fullmatch(r"[0-9]{20}", path.stem)
    ]


def _read(path: Path) -> Any:
    data = path.read_bytes()
    if len(data) < HEAD.size:
        raise Damaged(path, 0, f"{len(data)} bytes, less than a header")
    magic, size, crc = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or size != len(body) or zlib.crc32(body) != crc:
        raise Damaged(path, 0, f"{len(body)} bytes that are not what was written")
    return msgspec.msgpack.decode(body)


def _write(path: Path, body: bytes) -> None:
    """Whole or not at all, whenever the machine dies."""
    scratch = path.with_suffix(".part")
    try:
        with scratch.open("wb") as file:
            file.write(HEAD.pack(MAGIC, len(body), zlib.crc32(body)))
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
