"""A checkpoint of a running job: when, from whom, and in which order. `checkpoint` says what lies on disk.

    every shard has marked what it has at one cut (`cutting`)
    every shard: Write                                            beside the training
    ledger, settings, manifest last; old ones are dropped

A shard writes its part into the folder, or sends it where it does not see that (`shard.porter`, `depot`).

Rule: whatever goes wrong leaves the job and the checkpoints before as they were, is logged, and is tried again at the
next time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog

from ..checkpoint import BadCheckpoint, Refused, entries, entry, prune, read_manifest, shard_file
from ..checkpoint.folder import TENSORS
from ..checkpoint.tensors import MOST_HEADER
from ..errors import ZmlError
from ..layout import Registration
from ..messages import Write, Written
from ..piecewise import MOST_STATE
from ..status import CheckpointStatus
from ..tracing.trees import Tree
from .cutting import At, Cut, Cutter
from .depot import Intake, Kept
from .holds import Holds, NotTaken
from .orders import MOST_S, while_moving

WRITE_S = 600.0  # for a shard to write its part, or to send the next piece of it

log = structlog.get_logger()


Keep = Callable[[Intake], Awaitable[Sequence[Kept]]]  # bring further files; those that can be done without


class Taken(NamedTuple):
    path: Path
    step: int
    bytes: int  # of what the shards hold
    held_s: float  # that training stood still, or an update waited for copies of what it changes


class Held(NamedTuple):
    """What a checkpoint holds follows from this."""

    step: int
    ledger: Mapping[str, Any]
    job: Mapping[str, Any]


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except BadCheckpoint:
        return False
    return True


def on_disk(root: Path) -> CheckpointStatus:
    """Of the newest whole one that was taken before this coordinator began."""
    try:
        found = entries(root)
    except OSError:  # what cannot be read is told when one is taken
        found = []
    for each in reversed(found):
        try:
            manifest = read_manifest(root / each.name)
            at = datetime.fromisoformat(manifest.created)
        except (BadCheckpoint, ValueError):
            continue
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return CheckpointStatus(
            path=str(root / each.name), step=manifest.step, at=at.timestamp(), bytes=manifest.bytes
        )
    return CheckpointStatus()


class Checkpointer:
    """One job's checkpoints. `take` runs once at a time."""

    def __init__(
        self,
        job: str,
        root: Path,
        *,
        holds: Holds,
        shards: Callable[[], Sequence[str]],
        host: Callable[[str], str],
        at: At,
        keep: Keep,
        in_sync: bool = False,
        steps_before: int = 0,
        keep_last: int = 3,
        keep_every_steps: int = 0,
    ) -> None:
        """`shards` are those that hold chunks; none where they cannot all be asked. `host` is the member in whose
        process a shard lives. `at` takes the ledger."""
        self.job = job
        self.root = root
        self.holds = holds
        self.shards = shards
        self.host = host
        self.cutter = Cutter(holds, at, in_sync=in_sync)
        self.keep = keep
        self.steps_before = steps_before
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.newest: Path | None = None
        self.held: Held | None = None  # in it
        self.told = on_disk(root)
        self.intake: Intake | None = None  # of the checkpoint that is being written
        self.lock = asyncio.Lock()
        self.tree = Tree("zml.checkpoint")  # of the newest

    async def take(self, because: str, *, moves: bool = True) -> Path | None:
        """Take one; its folder, or None where that was not possible, which is logged. `moves`: are steps made? Where
        none are, and the newest has all there is, that one will do: another would only cost an older one its place.
        """
        async with self.lock:
            began = time.monotonic()
            self.tree = Tree("zml.checkpoint", job=self.job, because=because)
            try:
                taken = await self._take(because, moves)
            except (NotTaken, Refused, ZmlError) as error:
                self.tree.end(str(error))
                log.warning("no checkpoint", because=str(error), wanted=because)
                self.told = msgspec.structs.replace(
                    self.told, failed=self.told.failed + 1, because=str(error)
                )
                return None
            except asyncio.CancelledError:
                log.error(
                    "no checkpoint", because="the coordinator ended before it was whole", wanted=because
                )
                raise
            except Exception as error:  # a checkpoint is not worth those that would come after it
                self.tree.end(repr(error))
                log.error("no checkpoint", because=repr(error), wanted=because)
                self.told = msgspec.structs.replace(
                    self.told, failed=self.told.failed + 1, because=repr(error)
                )
                return None
            if isinstance(taken, Path):
                self.tree.end()
                log.info(
                    "no further checkpoint", path=str(taken), because="it has all there is", wanted=because
                )
                return taken
            log.info(
                "checkpoint",
                path=str(taken.path),
                because=because,
                held_s=round(taken.held_s, 4),
                seconds=round(time.monotonic() - began, 3),
            )
            self.tree.end(step=taken.step, bytes=taken.bytes, held_s=round(taken.held_s, 6))
            self.newest = taken.path
            self.told = CheckpointStatus(
                path=str(taken.path),
                step=taken.step,
                at=time.time(),
                bytes=taken.bytes,
                held_s=taken.held_s,
                took_s=time.monotonic() - began,
                taken=self.told.taken + 1,
                failed=self.told.failed,
            )
            return taken.path

    async def _take(self, because: str, moves: bool) -> Taken | Path:
        """The new one, or the one that has the same."""
        async with self.holds.lock:
            if not (shards := self.shards()):
                raise NotTaken("a shard is away, or there are no parameters yet")
            number = self.holds.next()
            agreed = await self.cutter.cut(number, shards, self.tree, moves=moves)
        step = self.steps_before + agreed.front.updates
        held = Held(step, agreed.cut.ledger, {**agreed.cut.job, "steps": 0})  # which come in late
        if not moves and held == self.held and self.newest is not None and _is_whole(self.newest):
            return self.newest
        with self.tree.within("zml.checkpoint.write"):
            path, stalled_s = await self._write(number, step, agreed.sizes, agreed.cut, because)
        self.held = held
        return Taken(path, step, sum(agreed.sizes.values()), agreed.held_s + stalled_s)

    async def _write(
        self, number: int, step: int, sizes: Mapping[str, int], cut: Cut, because: str
    ) -> tuple[Path, float]:
        """Its folder, and how long updates waited for what was to be written."""
        shards = list(sizes)
        self.intake = intake = await Intake.begin(self.root, step)
        try:
            await intake.run(intake.writer.must_have_room, sum(sizes.values()))
            registration = await intake.run(Registration.from_bytes, cut.registration)
            intake.most |= {shard_file(int(shard[1:])): size + MOST_HEADER for shard, size in sizes.items()}
            intake.most[TENSORS] = registration.layout.size * MOST_STATE + MOST_HEADER
            parts = [self._part(number, shard, intake) for shard in shards]
            written, kept = await asyncio.gather(asyncio.gather(*parts), self.keep(intake))
            for shard, part in zip(shards, written, strict=True):
                if part is None:
                    raise NotTaken(intake.trouble)
                await intake.adopt(shard_file(int(shard[1:])), part.bytes, part.xxh3)
            # Last, and when no piece is under way: to sync a file takes long, and the disk is asked in one thread.
            await intake.adopt_what_fits(kept)
            for name, data in cut.files.items():
                await intake.run(intake.writer.write, name, data)
            path = await intake.run(self._seal, intake, registration, cut, because)
            return path, max(part.stalled_s for part in written if part is not None)
        finally:
            self.intake = None
            await intake.end()

    async def _part(self, number: int, shard: str, intake: Intake) -> Written | None:
        """One shard's file is in the folder, or has come; None where it did neither, or nothing more comes."""
        name = shard_file(int(shard[1:]))
        intake.senders[name] = self.host(shard)
        order = Write(self.job, number, str(intake.writer.folder), name, trace=self.tree.header())
        asked = asyncio.ensure_future(self.holds.ask(shard, order, None, MOST_S))
        try:
            done = await while_moving(asked, lambda: intake.received[name], lambda: WRITE_S)
            answer = asked.result() if done else None
        finally:
            asked.cancel()
        if answer is None or not isinstance(answer.message, Written):
            intake.close(f"{shard} did not write its part; its log says why")  # the others need not go on
            return None
        return answer.message

    def _seal(self, intake: Intake, registration: Registration, cut: Cut, because: str) -> Path:
        path = intake.writer.seal(
            registration,
            ledger=cut.ledger,
            job=cut.job,
            epoch=cut.epoch,
            because=because,
            now=time.time(),
        )
        known = [found] if (found := entry(path.name)) is not None else []
        try:
            dropped = prune(self.root, self.keep_last, self.keep_every_steps, verified=known)
        except OSError as error:  # this one is safe
            log.warning("old checkpoints stay", because=str(error))
            return path
        for name in dropped:
            log.info("checkpoint dropped", name=name)
        return path
