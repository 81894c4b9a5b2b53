"""A script's part of checkpoints: the state of its optimizer, where that runs on the worker, to disk and back.

The senior worker is told to keep it (`Keep`). The training thread makes a copy after its next step; everything else
happens beside the training, here: the files are written into the checkpoint's folder where that can be seen from this
machine, else they travel to the coordinator in pieces (`piecewise`). Who resumes, fetches them.

Rule: a checkpoint is never worth a run. What fails here is logged, and the coordinator goes without these files.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import xxhash

from ..checkpoint import DISK
from ..checkpoint.disk import write_file
from ..checkpoint.folder import ABOUT, TENSORS, is_seen
from ..errors import BAD_CHECKPOINT, ZmlError
from ..iothread import IoThread
from ..messages import Fetch, Fetched, Keep, Kept, Piece
from ..piecewise import MOST_STATE, BadPieces, Source, send
from ..transport import Refused
from . import optimizer_state as state
from .binding import named_parameters
from .schedules import Schedules, Told

if TYPE_CHECKING:
    import torch

    from .client import Client

CLOSE_S = 30.0
NAMED = 16
KeptFile = tuple[str, int, str]  # name, bytes, xxh3
Files = Mapping[str, Sequence[memoryview]]  # by name, as pieces of memory one after another

log = structlog.get_logger()


class Keeping:
    """Between the training thread, which copies, and the I/O thread. One copy at a time is on its way.

    `on_worker`: the optimizer runs in the script. Where it does not, there is nothing here to keep or to restore.
    """

    def __init__(
        self, client: Client, io: IoThread, model: torch.nn.Module, schedules: Schedules, *, on_worker: bool
    ) -> None:
        self.client = client
        self.io = io
        self.named = named_parameters(model)
        self.schedules = schedules
        self.on_worker = on_worker
        self.order: Keep | None = None  # the newest, until the training thread has seen it
        self.under_way: concurrent.futures.Future[None] | None = None

    def look(self, epoch: int) -> None:
        """In the training thread, between two steps: copy what was asked for, if anything was."""
        order = self.order
        if order is None or (self.under_way is not None and not self.under_way.done()):
            return
        self.order = None
        files: Files = {}
        if self.on_worker:
            optimizer = self.schedules.optimizer
            tensors, described, left_out = state.copy_state(optimizer, self.named)
            told, more = self.schedules.tell(epoch)
            if left_out or more:
                log.info("not in the checkpoint", worker=self.client.seat.worker, what=[*left_out, *more])
            about = state.About(state.kind(optimizer), described, told)
            files = state.files(tensors, about)
        self.under_way = self.io.submit(keep(self.client, order, files))

    def restore(self) -> Told | None:
        """Before the first step: let the optimizer go on from the checkpoint, if the job goes on from one.

        Returns what the schedules said at that moment. Raises ZmlError.
        """
        if not self.on_worker:
            return None
        data = self.io.call(fetch(self.client, ABOUT, state.MOST_ABOUT))
        if data is None:
            return None
        most = sum(p.numel() for p in self.named.values()) * MOST_STATE + state.MOST_ABOUT
        tensors = self.io.call(fetch(self.client, TENSORS, most))
        try:
            about = state.read_about(data)
            read = state.read_tensors(tensors or b"")
        except state.BadState as bad:
            raise _bad(self.client, f"{ABOUT} or {TENSORS}", str(bad)) from None
        left_out = state.restore_optimizer(self.schedules.optimizer, self.named, read, about)
        if left_out:
            log.warning(
                "state of the optimizer left out", worker=self.client.seat.worker, what=left_out[:NAMED]
            )
        return about.told

    def close(self) -> None:
        """What is on its way arrives, if that does not take too long."""
        if self.under_way is not None:
            concurrent.futures.wait([self.under_way], CLOSE_S)


async def keep(client: Client, order: Keep, files: Files) -> None:
    """Bring the files into the checkpoint, and say so."""
    try:
        kept = await _write(Path(order.folder), files)
        if kept is None:
            kept = [await _stream(client, order, name, data) for name, data in files.items()]
        await client.of_checkpoint(Kept(**_me(client), checkpoint=order.checkpoint, files=kept))
    except Exception as error:
        log.warning("optimizer not kept", checkpoint=order.checkpoint, because=str(error))


def _me(client: Client) -> dict[str, Any]:
    seat = client.seat
    return {"job": seat.job, "member": seat.worker, "incarnation": seat.incarnation}


async def _write(folder: Path, files: Files) -> list[KeptFile] | None:
    """Into the folder itself; None where it is not there, or does not take them."""
    if not await asyncio.to_thread(is_seen, folder):
        return None
    kept = []
    for name, data in files.items():
        try:
            written = await asyncio.to_thread(write_file, DISK, folder / name, data)
        except OSError as error:
            log.info("optimizer is sent", because=f"{folder} cannot be written: {error.strerror or error}")
            return None
        kept.append((name, *written))
    return kept


async def _stream(client: Client, order: Keep, name: str, data: Sequence[memoryview]) -> KeptFile:
    def piece(offset: int) -> Piece:
        return Piece(**_me(client), checkpoint=order.checkpoint, name=name, offset=offset)

    return name, *await send(client.of_checkpoint, piece, data)


async def fetch(client: Client, name: str, most: int) -> bytes | None:
    """A file of the checkpoint that the job goes on from; None if it has none. Raises ZmlError."""

    def make(name: str, offset: int, most: int) -> Fetch:
        return Fetch(**_me(client), name=name, offset=offset, most=most)

    source = Source(client.of_checkpoint, make)
    try:
        said, first = await source.begin(name)
        if said.bytes < 0:
            return None
        if said.bytes > most:
            what = f"has {said.bytes:,} bytes, more than the {most:,} that this model can need"
            raise _bad(client, name, what)
        near = await asyncio.to_thread(_read, Path(said.path), said) if said.path else None
        return near if near is not None else await source.rest(said, name, first)
    except BadPieces as bad:
        raise _bad(client, name, str(bad)) from None
    except Refused as refused:
        raise _bad(client, name, f"cannot be had: {refused.because}") from refused


def _read(path: Path, said: Fetched) -> bytes | None:
    """From this machine's own disk, if this very file is there."""
    try:
        if path.stat().st_size != said.bytes:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    return data if _is(data, said) else None


def _is(data: bytes | bytearray, said: Fetched) -> bool:
    return len(data) == said.bytes and xxhash.xxh3_64_hexdigest(data) == said.xxh3


def _bad(client: Client, name: str, what: str) -> ZmlError:
    return ZmlError(
        BAD_CHECKPOINT, f"{client.seat.worker}: {name} of the checkpoint {what}", "Resume from an older one."
    )
