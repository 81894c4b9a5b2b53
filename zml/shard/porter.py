"""A shard's part of checkpoints: into the coordinator's folder, and from it when a job goes on.

Where the shard does not see that folder, its part goes to the coordinator and comes from it in pieces (`piecewise`),
over a connection of their own: heartbeats wait behind no megabytes. A path alone proves nothing, for another machine
may have a folder of that name. So a part is written only into a folder whose hidden name its writer has drawn at
random, and the writer looks for it there; what is read is the coordinator's if its manifest has the hash that came with
the order.

Rule: training goes on meanwhile. What fails costs this checkpoint, and is logged; what cannot be begun with changes
nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from ..checkpoint import BadCheckpoint, Checkpoint, shard_metadata
from ..checkpoint.folder import MANIFEST, hidden, is_file_name, is_seen
from ..checkpoint.manifest import MOST_BYTES, BadManifest, Manifest, parse
from ..checkpoint.partial import LENGTH_BYTES, Part
from ..checkpoint.tensors import header, write_tensors
from ..errors import DISK_FULL, ZmlError
from ..layout import Registration
from ..lease import COORDINATOR, Lease, ask
from ..messages import Assign, Fetch, Message, Piece, Write, Written
from ..piecewise import PIECE, PIECE_S, BadPieces, Source, send
from ..tracing.trees import part
from ..transport import Answer, Endpoint, Handler, Refusal, TransportError
from .begin import Sees, near, read_assignment
from .shard import Shard

if TYPE_CHECKING:
    from ..config import Settings

CONNECT_S = 10.0
FETCH_S = 600.0  # for one to come: the coordinator reads a file once through before, or is away
EACH_S = 60.0

log = structlog.get_logger()


class Porter:
    """One process'. `dial` makes an endpoint that reaches the coordinator; `lease` is the process' place in the job."""

    def __init__(
        self, settings: Settings, dial: Callable[[str, Handler], Endpoint], sees: Sees = is_seen
    ) -> None:
        self.settings = settings
        self.dial = dial
        self.sees = sees
        self.lease: Lease | None = None
        self._connections = count(1)
        self._writing: dict[str, tuple[Write, asyncio.Task[Message]]] = {}  # the newest order, by shard
        self._bringing = asyncio.Lock()  # an order that comes twice is not carried out twice

    # -- a checkpoint is made --------------------------------------------------------------------------------

    async def write(self, core: Shard, message: Write) -> Message:
        """What was marked last, beside the training. The same order once more waits for the same end. Raises
        Refusal."""
        former, writing = self._writing.get(core.name, (None, None))
        if writing is None or writing.done() or former != message:
            writing = asyncio.ensure_future(self._write_traced(core, message))
            writing.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._writing[core.name] = (message, writing)
        return await asyncio.shield(writing)

    async def _write_traced(self, core: Shard, message: Write) -> Message:
        with part(message.trace, "zml.ps.write", job=message.job, shard=core.name):
            return await self._write(core, message)

    async def _write(self, core: Shard, message: Write) -> Message:
        copy, folder = core.copy, Path(message.folder)
        if copy is None or copy[0] != message.checkpoint:
            raise Refusal("checkpoint", f"{core.name} has no copy for checkpoint {message.checkpoint}")
        named = hidden(folder.name)
        if named is None or named.kind != "partial" or not is_file_name(message.name):
            raise Refusal("checkpoint", f"{folder / message.name} is no file of a checkpoint in the making")
        snapshot = copy[1]
        if snapshot.begun:  # into another folder
            raise Refusal("checkpoint", f"{core.name} is writing checkpoint {message.checkpoint} already")
        described = [(tensor, (size,)) for tensor, size in await asyncio.to_thread(snapshot.described)]
        metadata = shard_metadata({index: version for index, (version, _, _) in snapshot.versions.items()})
        try:
            because = f"{folder.parent} is not on this machine"
            if await asyncio.to_thread(self.sees, folder):
                try:
                    written = await asyncio.to_thread(
                        write_tensors, folder / message.name, described, snapshot.data(), metadata
                    )
                    return Written(*written, snapshot.stalled_s)
                except ZmlError as error:
                    if error.code == DISK_FULL or snapshot.begun:
                        raise
                    because = error.what
            log.info("a checkpoint is sent", shard=core.name, because=because)
            first, _ = header(described, metadata)
            sent = await self._send(folder.name, message.name, chain([memoryview(first)], snapshot.data()))
            return Written(*sent, snapshot.stalled_s)
        except (ZmlError, TransportError) as error:
            log.warning("a part of a checkpoint is missing", shard=core.name, because=str(error))
            raise Refusal("checkpoint", str(error)) from None
        finally:
            snapshot.close()
            if core.copy is copy:  # and not the next one's
                core.copy = None

    async def _send(self, checkpoint: str, name: str, data: Iterable[memoryview]) -> tuple[int, str]:
        def piece(offset: int) -> Piece:
            return Piece(**self._me(), checkpoint=checkpoint, name=name, offset=offset)

        async with self._connected(CONNECT_S) as endpoint:

            async def say(message: Message, payload: Any) -> Answer:
                return await endpoint.request(COORDINATOR, message, payload, timeout_s=PIECE_S)

            return await send(say, piece, data)

    # -- a job goes on from one ------------------------------------------------------------------------------

    async def bring(self, core: Shard, message: Assign, payload: bytes | memoryview) -> None:
        """Let the shard have at hand what its chunks begin with. Raises Refusal, and then nothing has changed."""
        registration, assignment = read_assignment(payload)
        me = int(core.name[1:])
        mine = [chunk for chunk, home in enumerate(assignment.placement) if home == me]
        async with self._bringing:
            if core.store is not None or core.brought is not None:
                return
            try:
                core.brought = await self._find(message, registration, mine)
            except (ZmlError, BadPieces, TransportError) as error:
                what = f"{core.name} cannot begin with {message.checkpoint}: {error}"
                log.error("cannot begin", shard=core.name, because=str(error))
                raise Refusal("checkpoint", what) from None

    async def _find(self, message: Assign, registration: Registration, chunks: list[int]) -> Checkpoint:
        folder = Path(message.checkpoint)
        because = "it is not on this machine"
        if await asyncio.to_thread(self.sees, folder):
            try:
                return await asyncio.to_thread(near, folder, message.manifest, chunks)
            except BadCheckpoint as bad:
                because = bad.because
        log.info("a checkpoint is fetched", folder=str(folder), because=because)

        def fetch(name: str, offset: int, most: int) -> Fetch:
            return Fetch(**self._me(), name=name, offset=offset, most=most)

        async with self._connected(FETCH_S) as endpoint:

            async def say(message: Message, payload: Any) -> Answer:
                return await ask(endpoint, message, within_s=FETCH_S, each_s=EACH_S)

            return await _fetch(Source(say, fetch), folder, message.manifest, registration, chunks)

    # -- the connection --------------------------------------------------------------------------------------

    def _me(self) -> dict[str, Any]:
        assert self.lease is not None, "orders come to members"
        joined = self.lease.joined
        return {"job": joined.job, "member": joined.member, "incarnation": joined.incarnation}

    @asynccontextmanager
    async def _connected(self, within_s: float) -> AsyncIterator[Endpoint]:
        me = self._me()
        name = f"{me['member']}.{me['incarnation']}.files{next(self._connections)}"
        endpoint = self.dial(name, _nobody)
        await endpoint.start()
        try:
            await endpoint.connect(COORDINATOR, self.settings.coordinator, timeout_s=within_s)
            yield endpoint
        finally:
            await endpoint.close()


def _nobody(peer: str, message: Any, payload: memoryview | None) -> None:
    raise Refusal("unexpected", "nobody asks here")


async def _fetch(
    source: Source, folder: Path, manifest: str, registration: Registration, chunks: list[int]
) -> Checkpoint:
    """These chunks, and of everything else only where they lie."""
    part = Part(folder, await _manifest(source, folder, manifest), registration, chunks)
    for name in part.names:
        try:
            size = part.header_bytes(name, await source.some(name, 0, LENGTH_BYTES))
            header = bytearray()
            while len(header) < size:
                header += await source.some(name, len(header), min(PIECE, size - len(header)))
        except BadPieces as bad:
            raise BadCheckpoint(folder, name, str(bad)) from None
        await asyncio.to_thread(part.describe, name, bytes(header))
    try:
        await source.all(part.lacks(PIECE), part.put)
    except BadPieces as bad:
        raise BadCheckpoint(folder, bad.name, str(bad)) from None
    return part.checkpoint


async def _manifest(source: Source, folder: Path, expected: str) -> Manifest:
    try:
        said, first = await source.begin(MANIFEST)
        if said.bytes < 0:
            raise BadCheckpoint(folder, MANIFEST, "is not at the coordinator")
        if said.bytes > MOST_BYTES:
            raise BadCheckpoint(folder, MANIFEST, f"has {said.bytes} bytes, more than {MOST_BYTES}")
        found = parse(await source.rest(said, MANIFEST, first))
    except (BadPieces, BadManifest) as bad:
        raise BadCheckpoint(folder, MANIFEST, str(bad)) from None
    if expected and found.xxh3 != expected:
        raise BadCheckpoint(folder, MANIFEST, "is not the one that the job began with")
    return found
