"""Files of checkpoints in pieces: the coordinator's side. What is being made takes them in, what the job began with
gives them out; `piecewise` is the members' side.

Rules: of each file one member is expected to send it, no more than it can have, and nobody else may. A path is never
made of what a peer says: only names that are known beforehand are looked at. The disk is waited for in other threads; a
writer has one thread, and so everything that is asked of it happens in that order and never at once.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import structlog
import xxhash

from ..checkpoint import BadCheckpoint, Checkpoint, Gap, Refused, Writer
from ..checkpoint.disk import Buffer
from ..checkpoint.folder import ABOUT, MANIFEST, SHARD, TENSORS
from ..checkpoint.manifest import MOST_BYTES, File, Manifest
from ..checkpoint.reading import Identity, hash_file, identity, read_manifest
from ..checkpoint.tensors import MOST_HEADER
from ..errors import ZmlError
from ..messages import Fetch, Fetched, Message, Ok, Piece
from ..piecewise import GAP, PIECE
from ..transport import Refusal

Kept = tuple[str, int, str]  # a script's file: name, bytes, xxh3

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")


class Intake:
    """One checkpoint in the making."""

    def __init__(self, writer: Writer, thread: ThreadPoolExecutor) -> None:
        self.writer = writer
        self.senders: dict[str, str] = {}  # by file, who may send it
        self.most: dict[str, int] = {}  # by file, bytes that it may have
        self.received: Counter[str] = Counter()  # pieces, by file
        self.closed = False
        self.trouble = ""  # why it cannot become one
        self._thread = thread

    @classmethod
    async def begin(cls, root: Path, step: int) -> Intake:
        """Raises ZmlError where the disk does not take it."""
        thread = ThreadPoolExecutor(1, "zml-checkpoint")
        try:
            return cls(await asyncio.get_running_loop().run_in_executor(thread, Writer, root, step), thread)
        except BaseException:
            thread.shutdown(wait=False)
            raise

    @property
    def name(self) -> str:
        """No other checkpoint has it, not even one of a coordinator that was this one before."""
        return self.writer.folder.name

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In the writer's thread, after all that was asked before."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def take(self, message: Piece, payload: Buffer) -> Message:
        """Raises Refusal."""
        if self.closed:
            raise Refusal("checkpoint", self.trouble or f"{self.name} is given up")
        if self.senders.get(message.name) != message.member:
            raise Refusal("checkpoint", f"{message.member} is not to send {message.name[:60]!r}")
        if len(payload) > PIECE:
            raise Refusal("checkpoint", f"a piece of {len(payload)} bytes; {PIECE} are allowed")
        if message.offset + len(payload) > (most := self.most.get(message.name, MOST_HEADER)):
            raise Refusal("checkpoint", f"{message.name} can have {most:,} bytes, and more came")
        try:
            await self.run(self._piece, message, payload)
        except Gap as gap:
            raise Refusal(GAP, str(gap)) from None
        except Refused as refused:
            raise Refusal("checkpoint", str(refused)) from None
        except ZmlError as error:
            self.close(str(error))
            raise Refusal("checkpoint", str(error)) from None
        self.received[message.name] += 1
        return Ok()

    def _piece(self, message: Piece, payload: Buffer) -> None:
        self._check()
        self.writer.piece(message.name, message.offset, payload)

    async def adopt(self, name: str, size: int, xxh3: str) -> None:
        """This file is complete. Raises Refused."""

        def adopt() -> None:
            self._check()
            self.writer.adopt(name, size, xxh3)

        await self.run(adopt)

    async def adopt_what_fits(self, files: Sequence[Kept]) -> None:
        """These belong together, and the checkpoint can go without them: all of them, or none."""
        try:
            for file in files:
                await self.adopt(*file)
        except Refused as refused:
            await self.without(str(refused), *(name for name, _, _ in files))

    async def without(self, because: str, *names: str) -> None:
        await self.forget(*names)
        log.warning("a checkpoint without the worker's optimizer", because=because)

    async def forget(self, *names: str) -> None:
        """Go without these, and take nothing more of them."""
        for name in names:
            self.senders.pop(name, None)
            await self.run(self.writer.forget, name)

    def _check(self) -> None:
        if self.writer.over:
            raise Refused(self.trouble or f"{self.name} is not being made any more")

    def close(self, because: str = "") -> None:
        """From now on nothing is taken; the first reason counts."""
        self.closed = True
        self.trouble = self.trouble or because

    async def end(self) -> None:
        """What was not sealed is removed."""
        self.close()
        await self.run(self.writer.abandon)
        self._thread.shutdown(wait=False)


class _Open(NamedTuple):
    file: File
    path: Path


class Offer:
    """The checkpoint in `folder`, which the job began with; empty: with none. `manifest` is the hash by which it is
    known, empty where an older process began the job; `loaded` is what this one has read of it."""

    def __init__(self, job: str, folder: str, manifest: str = "", loaded: Checkpoint | None = None) -> None:
        self.job = job
        self.folder = folder
        self.manifest = manifest
        self.seen: Mapping[str, Identity] = (
            loaded.seen if loaded is not None and str(loaded.path) == folder else {}
        )
        self.given: defaultdict[str, int] = defaultdict(int)  # answers with bytes, by the member that asked
        self._lock = asyncio.Lock()  # one file at a time is verified
        self._manifest: Manifest | None = None
        # Also what is not there, or cannot be given out.
        self._verified: dict[str, _Open | ZmlError | None] = {}

    async def fetched(self, message: Fetch, *, to_shard: bool) -> tuple[Message, bytes]:
        """Some bytes of a file. Raises Refusal.

        A shard may have the manifest and shards' files, a script what scripts have kept. Before anything of a file is
        given out it is held against the manifest: who takes a part of it could not do so.
        """
        name = message.name
        known = name == MANIFEST or SHARD.fullmatch(name) if to_shard else name in (ABOUT, TENSORS)
        if not self.folder or not known:
            return Fetched(self.job, -1), b""
        try:
            found = await self._open(name)
            if found is None:
                return Fetched(self.job, -1), b""
            size = found.file.bytes
            if not 0 <= message.offset <= size or not 0 < message.most <= PIECE:
                raise Refusal("checkpoint", f"{message.most} bytes of {name} from {message.offset} on")
            count = min(message.most, size - message.offset)
            data = await asyncio.to_thread(_read, found.path, message.offset, count)
        except (OSError, ZmlError) as error:
            raise Refusal("checkpoint", f"{name} cannot be read: {error}") from None
        piece = xxhash.xxh3_64_hexdigest(data)
        self.given[message.member] += 1
        return Fetched(self.job, size, found.file.xxh3, str(found.path), piece), data

    async def _open(self, name: str) -> _Open | None:
        """Who asks for a file that is verified waits for no other. Raises OSError, and ZmlError."""
        if name not in self._verified:
            async with self._lock:
                if name not in self._verified:
                    try:
                        self._verified[name] = await asyncio.to_thread(self._verify, name)
                    except ZmlError as bad:
                        self._verified[name] = bad
        found = self._verified[name]
        if isinstance(found, ZmlError):
            raise found
        return found

    def _verify(self, name: str) -> _Open | None:
        """None where there is no such file."""
        folder = Path(self.folder)
        if self._manifest is None:
            found = read_manifest(folder)
            if self.manifest and found.xxh3 != self.manifest:
                raise BadCheckpoint(folder, MANIFEST, "is not the one that the job began with")
            self._manifest = found
        path = folder / name
        if name == MANIFEST:
            size, xxh3 = hash_file(path)
            if size > MOST_BYTES:
                raise BadCheckpoint(folder, name, f"has {size} bytes, more than {MOST_BYTES}")
            listed = File(size, xxh3)
        elif name not in self._manifest.files:
            return None
        else:
            listed = self._manifest.files[name]
            if self.seen.get(name) != identity(path) and File(*hash_file(path)) != listed:
                raise BadCheckpoint(folder, name, "has changed since it was written")
        return _Open(listed, path)


def _read(path: Path, offset: int, count: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(handle, count, offset)
    finally:
        os.close(handle)
    if len(data) != count:
        raise OSError(f"it ends after {offset + len(data)} bytes")
    return data
