"""What processes print: into their logs here, and from there to a coordinator whose folder this node does not see.

Rule: the files are the memory. What is sent next is what stands behind that which the coordinator says it has, so that
a piece that was lost, came twice, or met a coordinator that was started again is neither lacking nor doubled. One piece
of a node is on its way at a time, and never faster than `MOST_BYTES_S`: heartbeats and orders go beside it. A process's
end is told when its last bytes have arrived, or when they do not.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import structlog

from ..launch.child import lines_of
from ..lease import ASK_S, COORDINATOR
from ..logs.outlets import KEPT
from ..logs.printed import Printed
from ..logs.reading.files import Part, read
from ..transport import Endpoint, Refused, TransportError
from .wire import OUTPUT_BYTES, Output, Stored

KINDS = ("out", "out.jsonl", "jsonl", "script.jsonl", "log", "log.jsonl")
LOOK_S = 0.5
AGAIN_S = 1.0
MOST_BYTES_S = 8 << 20
LAST_S = 10.0  # for the last bytes of a process; time in which the coordinator is away does not count
FAILED_S = 2.0  # of one that did not end well: others wait to hear of it
LAST_LINES = 5

log = structlog.get_logger()


async def copy(process: Process, printed: Printed, last: list[str], *, both: bool) -> None:
    """What it prints goes to its log; the last lines are remembered. `both`: of its standard output, too, which else
    is its script's, and written down already."""
    assert process.stdout is not None and process.stderr is not None

    async def keep(name: str, stream: asyncio.StreamReader, *, remember: bool) -> None:
        async for line in lines_of(stream):
            if remember:
                last.append(line)
                del last[:-LAST_LINES]
                printed.line(name, line)

    try:
        await asyncio.gather(
            keep("stdout", process.stdout, remember=both), keep("stderr", process.stderr, remember=True)
        )
    finally:
        printed.close()


# -- what comes next -----------------------------------------------------------------------------------------


class Tail:
    """How far one output has got. No I/O: it is shown the files, and says what of them is to be sent."""

    def __init__(self, name: str, before: Sequence[Part] = ()) -> None:
        """`before`: files of a former process, which are none of this one's business."""
        self.name = name
        self.inode = before[-1].inode if before else 0  # of the file that is being sent
        self.offset = before[-1].size if before else 0  # up to which it has been
        self.at = -1  # where in the coordinator's file the next byte belongs; -1: it has to be asked
        self.full = False  # it takes no more
        self.missed = False  # some of it was rotated away before it was sent
        self.behind = 0  # bytes that were there when it was looked, and not sent

    def next(self, parts: Sequence[Part]) -> Part | None:
        """Which file to send of, from `offset` on. `parts`: all that there are, the oldest first, the last grows."""
        inodes = [part.inode for part in parts]
        self.behind = 0
        if self.full or not parts:
            return None
        if self.inode not in inodes:
            self.missed = self.missed or self.inode != 0
            self.inode, self.offset = inodes[0], 0
        index = inodes.index(self.inode)
        if parts[index].size < self.offset:  # somebody has emptied it
            self.offset = 0
        self.behind = sum(part.size for part in parts[index:]) - self.offset
        while self.offset == parts[index].size:
            if index + 1 == len(parts):
                return None
            index += 1
            self.inode, self.offset = inodes[index], 0
        return parts[index]

    def answered(self, stored: Stored) -> None:
        """The coordinator's answer to a piece, or to the question how far it is."""
        if self.at >= 0:
            # It may have more than this piece, whose forerunner arrived and was not answered; and less than it had,
            # where its machine died with that not on disk. Nobody else writes there meanwhile.
            self.offset = max(0, self.offset + stored.bytes - self.at)
        self.at, self.full = stored.bytes, stored.full


class Piece(NamedTuple):
    """Without data it is the question how far the coordinator is."""

    tail: Tail
    data: bytes


# -- files and messages --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Followed:
    """The outputs of a process, through all times that it is started again."""

    job: str
    slot: str
    folder: Path
    tails: list[Tail]
    ending: bool = False
    empty: asyncio.Event = field(default_factory=asyncio.Event)  # set when it ends and nothing is left


def parts_of(path: Path) -> list[Part]:
    """The files of an output, the oldest first. Looked at from the newest on, as they are renamed: one that is renamed
    meanwhile is seen twice rather than not at all."""
    found: list[Part] = []
    for number in range(KEPT + 2):
        name = path.with_name(f"{path.name}.{number}") if number else path
        try:
            about = name.stat(follow_symlinks=False)
        except OSError:
            break
        if all(about.st_ino != part.inode for part in found):
            found.append(Part(name, about.st_ino, about.st_size, about.st_mtime))
    return found[::-1]


class Sender:
    """Of one node. `heard`: is the coordinator there?"""

    def __init__(self, node: str, endpoint: Endpoint, heard: Callable[[], bool]) -> None:
        self.node = node
        self.endpoint = endpoint
        self.heard = heard
        self.followed: dict[tuple[str, str], Followed] = {}
        self.hurried = False  # the node ends: a coordinator that is away is not waited for
        self.trouble = ""
        self.woken = asyncio.Event()

    async def follow(self, job: str, slot: str, folder: Path) -> None:
        """Send what this process writes from now on into this `logs` folder. To be called before it is started."""

        def tails() -> list[Tail]:
            names = [f"{slot}.{kind}" for kind in KINDS]
            return [Tail(name, parts_of(folder / name)) for name in names]

        self.followed[job, slot] = Followed(job, slot, folder, await asyncio.to_thread(tails))

    async def finish(self, job: str, slot: str, within_s: float = LAST_S) -> None:
        """Its process is gone: return when all of its output has arrived, or when that takes too long."""
        followed = self.followed.get((job, slot))
        if followed is None:
            return
        followed.ending, left_s = True, within_s
        self.woken.set()
        while not followed.empty.is_set() and left_s > 0 and (self.heard() or not self.hurried):
            try:
                async with asyncio.timeout(LOOK_S):
                    await followed.empty.wait()
            except TimeoutError:
                if self.heard():
                    left_s -= LOOK_S
        if not followed.empty.is_set():
            waiting = {tail.name: tail.behind for tail in followed.tails if tail.behind}
            log.warning(
                "output not sent",
                job=job,
                slot=slot,
                bytes=waiting,
                because=self.trouble or f"it takes longer than {within_s:g} s",
                lies_in=str(followed.folder),
            )
        del self.followed[job, slot]

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                pause_s = await self._turn()
            except Exception:  # a mistake of ours is not the end of everybody's output
                log.exception("output is not sent", node=self.node)
                pause_s = AGAIN_S
            try:
                async with asyncio.timeout(pause_s):
                    await self.woken.wait()
            except TimeoutError:
                pass

    async def _turn(self) -> float:
        """Send until nothing is left, or nobody takes it; returns when to look again."""
        while True:
            self.woken.clear()
            # Those that are about to end first, then those that had their turn longest ago.
            turn = sorted(self.followed.values(), key=lambda each: not each.ending)
            ending = [each for each in turn if each.ending]
            found = await asyncio.to_thread(look, turn)
            for each in turn:
                self._say_what_is_lost(each)
            for each in ending:
                if not any(tail.behind for tail in each.tails):
                    each.empty.set()
            if found is None:
                return LOOK_S
            followed, piece = found
            if not await self._send(followed, piece):
                return AGAIN_S
            if (key := (followed.job, followed.slot)) in self.followed:
                self.followed[key] = self.followed.pop(key)
            await asyncio.sleep(len(piece.data) / MOST_BYTES_S)

    def _say_what_is_lost(self, followed: Followed) -> None:
        for tail in followed.tails:
            if tail.missed:
                tail.missed = False
                because = "it was rotated away before it was sent"
                log.warning("output is lost", job=followed.job, name=tail.name, because=because)

    async def _send(self, followed: Followed, piece: Piece) -> bool:
        """Whether there is an answer."""
        tail = piece.tail
        output = Output(self.node, followed.job, followed.slot, tail.name, tail.at)
        try:
            answer = await self.endpoint.request(COORDINATOR, output, piece.data or None, timeout_s=ASK_S)
            assert isinstance(answer.message, Stored), answer.message
            tail.answered(answer.message)
        except Refused as refused:
            because = refused.because
            if refused.code == "elsewhere":  # it is to end, and no longer this node's word
                for each in followed.tails:
                    each.full, each.behind = True, 0
            elif refused.code == "output":
                tail.full, tail.behind = True, 0
        except TransportError as error:
            because = str(error)
        else:
            if self.trouble:
                self.trouble = ""
                log.info("output is sent again", node=self.node)
            return True
        if not self.trouble:
            self.trouble = because
            log.warning("output is not taken", job=followed.job, name=tail.name, because=because)
        return tail.full


def look(turn: Sequence[Followed]) -> tuple[Followed, Piece] | None:
    """The next piece, of the first that has one; what all others have left is counted, too."""
    found: tuple[Followed, Piece] | None = None
    for each in turn:
        for tail in each.tails:
            part = tail.next(parts_of(each.folder / tail.name))
            if part is not None and found is None:
                data = read(part, tail.offset, OUTPUT_BYTES) if tail.at >= 0 else b""
                if data or tail.at < 0:  # else it was rotated this very moment
                    found = each, Piece(tail, data)
    return found
