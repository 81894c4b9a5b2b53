"""Files of checkpoints in pieces, between the coordinator and members that do not see its folder: the members' side.

A file is sent as it is made, a few pieces under way; one that has overtaken the piece before it is sent once more, and
twice is the same as once. What is fetched is held against the hash that came with it, and a file against its own.
`coordinator.depot` is the other side. `say` asks the coordinator, with a deadline.
"""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import xxhash

from .checkpoint import Written
from .messages import Fetch, Fetched, Piece
from .transport import Answer, Refused

PIECE = 1 << 20  # bytes; the most that a control message takes
PIECE_S = 30.0  # for one to arrive and be written
MOST_STATE = 128  # bytes of a script's optimizer per parameter that are taken: Adam's has 8 in 32 bits
WINDOW = 4  # pieces under way
GAP = "gap"  # the refusal of a piece that came before the one it follows

Say = Callable[[Any, Any], Awaitable[Answer]]  # message, payload -> the coordinator's answer


class BadPieces(ValueError):
    """This file cannot be had as it was written. The text says why, and begins in mid-sentence: `name` comes before."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(what)
        self.name = name


# -- to the coordinator ------------------------------------------------------------------------------------


async def send(say: Say, make: Callable[[int], Piece], data: Iterable[memoryview]) -> Written:
    """A whole file; `make` makes the message of the piece that begins at a byte.

    What the pieces are made of must not change meanwhile. Raises what `say` raises, and then nothing is under way.
    """
    digest, offset = xxhash.xxh3_64(), 0
    under_way: deque[asyncio.Task[None]] = deque()
    try:
        for piece in pieces(data):
            if len(under_way) == WINDOW:
                await under_way.popleft()
            before = under_way[-1] if under_way else None
            under_way.append(asyncio.ensure_future(_send(say, make(offset), piece, before)))
            digest.update(piece)
            offset += len(piece)
        while under_way:
            await under_way.popleft()
    finally:
        await _cancelled(under_way)
    return Written(offset, digest.hexdigest())


async def _send(say: Say, message: Piece, piece: memoryview, before: asyncio.Task[None] | None) -> None:
    try:
        await say(message, piece)
    except Refused as refused:
        if refused.code != GAP or before is None:
            raise
        await before  # this one had overtaken it
        await say(message, piece)


async def _cancelled(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def pieces(data: Iterable[memoryview], size: int = PIECE) -> Iterator[memoryview]:
    """The same bytes in pieces of this size, the last one shorter: of many small tensors and of few large ones."""
    gathered = bytearray()
    for buffer in data:
        at = 0
        while at < len(buffer):
            if not gathered and len(buffer) - at >= size:
                yield buffer[at : at + size]
                at += size
                continue
            part = buffer[at : at + size - len(gathered)]
            gathered += part
            at += len(part)
            if len(gathered) == size:
                yield memoryview(gathered)
                gathered = bytearray()
    if gathered:
        yield memoryview(gathered)


# -- from the coordinator ----------------------------------------------------------------------------------


class Source:
    """The checkpoint that the job goes on from, piece by piece. `make` makes the message that asks for some bytes."""

    def __init__(self, say: Say, make: Callable[[str, int, int], Fetch]) -> None:
        self.say = say
        self.make = make

    async def begin(self, name: str) -> tuple[Fetched, memoryview]:
        """What the coordinator says of a file, with its first bytes. Raises BadPieces."""
        said, data = await self._ask(name, 0, PIECE)
        if said.bytes >= 0:
            _check(name, said, data, min(PIECE, said.bytes))
        return said, data

    async def some(self, name: str, offset: int, count: int) -> memoryview:
        """These very bytes. Raises BadPieces where they are not there or have changed on their way."""
        said, data = await self._ask(name, offset, count)
        _check(name, said, data, count)
        return data

    async def rest(self, said: Fetched, name: str, first: memoryview) -> bytes:
        """All of a file of which `begin` has told. Raises BadPieces."""
        whole = io.BytesIO()  # it gives away what it holds, and no copy

        def take(name: str, offset: int, data: memoryview) -> None:
            whole.seek(offset)
            whole.write(data)

        take(name, 0, first)
        missing = range(len(first), said.bytes, PIECE)
        await self.all([(name, at, min(PIECE, said.bytes - at)) for at in missing], take)
        data = whole.getvalue()
        if xxhash.xxh3_64_hexdigest(data) != said.xxh3:
            raise BadPieces("did not arrive as it was written", name)
        return data

    async def all(
        self, wanted: Iterable[tuple[str, int, int]], take: Callable[[str, int, memoryview], None]
    ) -> None:
        """Many pieces, (name, offset, count), a few under way at a time. Raises what `some` and `take` raise."""
        under_way: deque[asyncio.Task[None]] = deque()

        async def one(name: str, offset: int, count: int) -> None:
            take(name, offset, await self.some(name, offset, count))

        try:
            for each in wanted:
                if len(under_way) == WINDOW:
                    await under_way.popleft()
                under_way.append(asyncio.ensure_future(one(*each)))
            while under_way:
                await under_way.popleft()
        finally:
            await _cancelled(under_way)

    async def _ask(self, name: str, offset: int, count: int) -> tuple[Fetched, memoryview]:
        assert 0 < count <= PIECE
        answer = await self.say(self.make(name, offset, count), None)
        if not isinstance(answer.message, Fetched):
            raise BadPieces(f"was asked for, and {type(answer.message).__name__} came", name)
        return answer.message, answer.payload if answer.payload is not None else memoryview(b"")


def _check(name: str, said: Fetched, data: memoryview, count: int) -> None:
    if said.bytes < 0:
        raise BadPieces("is not there any more", name)
    if len(data) != count:
        raise BadPieces(f"was cut: {len(data):,} of {count:,} bytes came", name)
    if xxhash.xxh3_64_hexdigest(data) != said.piece:
        raise BadPieces("did not arrive as it was sent", name)
