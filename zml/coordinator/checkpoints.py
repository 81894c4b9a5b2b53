"""A job's checkpoints: when they are taken, what the coordinator adds to them, and how a job begins with one.

`checkpointer` takes one, `checkpoint` says what lies on disk. Here is the job's side: its settings, its data ledger,
and what of both an earlier run has left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import structlog

from ..checkpoint import BadCheckpoint, Checkpoint
from ..checkpoint.disk import Buffer
from ..checkpoint.folder import ABOUT, MANIFEST, TENSORS
from ..intervals import intervals
from ..layout import BadLayout, Registration
from ..messages import Front, JobSpec, Kept, Message, Ok, Piece
from ..rates import Course
from ..scheduler import calls
from ..scheduler.batches import MOST_BATCHES, Ledger
from ..scheduler.epoch import COMMITTED, SKIPPED, Pass
from ..scheduler.ids import WorkerId
from ..shard.holding import Applied
from ..transport import Refusal
from .checkpointer import Checkpointer
from .cutting import Cut
from .depot import Intake
from .depot import Kept as KeptFile
from .facts import Begun, Noted
from .holds import Holds
from .orders import while_moving

LOOK_EVERY_S = 0.25
KEEP_S = 60.0  # for the senior's script to come to the end of its step and write, or to send the next piece

log = structlog.get_logger()


@dataclass(slots=True)
class When:
    """Every so many steps, every so many minutes; 0: never."""

    steps: int = 0
    minutes: float = 0.0
    last_steps: int = 0
    last_at: float = 0.0

    def begin(self, now: float) -> None:
        self.last_at = now

    def due(self, steps: int, now: float) -> str:
        """Why a checkpoint is due now; empty where none is. `steps`: of the worker that has made the most."""
        if steps < self.last_steps:
            self.last_steps = 0  # all scripts have begun anew, and count from 0
        if steps <= self.last_steps:
            return ""  # nothing has happened since
        if self.steps and steps - self.last_steps >= self.steps:
            return f"every {self.steps:,} steps"
        if self.minutes and now - self.last_at >= 60 * self.minutes:
            return f"every {self.minutes:g} minutes"
        return ""

    def rest_s(self, now: float) -> float | None:
        """For so long none can be due, or need not be looked for; None: for ever."""
        if self.steps:
            return LOOK_EVERY_S
        return max(LOOK_EVERY_S, self.last_at + 60 * self.minutes - now) if self.minutes else None

    def taken(self, steps: int, now: float) -> None:
        self.last_steps, self.last_at = steps, now


class Checkpoints:
    """One job's. `end` may be called any number of times, and takes one."""

    def __init__(
        self,
        job: str,
        root: Path,
        when: When,
        *,
        holds: Holds,
        shards: Callable[[], list[str]],
        host: Callable[[str], str],
        facts: Callable[[Front, bool], Cut | None],
        steps: Callable[[], int],
        ask_to_keep: Callable[[str, str], str] = lambda checkpoint, folder: "",
        until_gone: Callable[[str], Coroutine[Any, Any, None]] = lambda member: asyncio.sleep(KEEP_S),
        in_sync: bool = False,
        steps_before: int = 0,
        keep_last: int = 3,
        keep_every_steps: int = 0,
    ) -> None:
        self.when = when
        self.steps = steps
        self.last: asyncio.Task[Path | None] | None = None
        self.looking: asyncio.Task[None] | None = None
        self.ask_to_keep = ask_to_keep
        self.until_gone = until_gone  # this member's script is not there any more
        self.keeping: tuple[str, str, asyncio.Future[Kept]] | None = (
            None  # what is kept, who is asked, and has not answered
        )

        self.checkpointer = Checkpointer(
            job,
            root,
            holds=holds,
            shards=shards,
            host=host,
            at=facts,
            keep=self._keep,
            in_sync=in_sync,
            steps_before=steps_before,
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )

    def start(self) -> None:
        """Look from now on whether one is due."""
        self.looking = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self.when.begin(loop.time())
        # Thousands of jobs look, and most of them for what is due in minutes.
        while (rest_s := self.when.rest_s(loop.time())) is not None:
            await asyncio.sleep(rest_s)
            if because := self.when.due(self.steps(), loop.time()):
                await self.take(because)

    async def take(self, because: str, *, moves: bool = True) -> Path | None:
        steps = self.steps()
        path = await self.checkpointer.take(because, moves=moves)
        self.when.taken(steps, asyncio.get_running_loop().time())  # also where it failed: not at once again
        return path

    async def _keep(self, intake: Intake) -> Sequence[KeptFile]:
        """What lives in the senior's script, if that comes and does not take too long."""
        member = self.ask_to_keep(intake.name, str(intake.writer.folder))
        if not member:
            return ()
        gone = asyncio.ensure_future(self.until_gone(member))
        try:
            intake.senders |= dict.fromkeys((ABOUT, TENSORS), member)
            kept: asyncio.Future[Kept] = asyncio.get_running_loop().create_future()
            self.keeping = (intake.name, member, kept)
            come = intake.received
            both: set[asyncio.Future[Any]] = {kept, gone}
            either = asyncio.ensure_future(asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED))
            await while_moving(either, lambda: come[ABOUT] + come[TENSORS], lambda: KEEP_S)
            either.cancel()
            if kept.done():
                return kept.result().files
            because = f"the script of {member} has ended" if gone.done() else "it did not come in time"
            await intake.without(because, ABOUT, TENSORS)
            return ()
        finally:
            gone.cancel()
            self.keeping = None

    async def receive(self, message: Piece | Kept, payload: Buffer) -> Message:
        """A file of the checkpoint that is being made, from the senior's script or a shard. Raises Refusal."""
        if isinstance(message, Piece):
            intake = self.checkpointer.intake
            if intake is None or intake.name != message.checkpoint:
                raise Refusal("checkpoint", f"checkpoint {message.checkpoint[:60]} is not being made")
            return await intake.take(message, payload)
        if self.keeping is None or self.keeping[:2] != (message.checkpoint, message.member):
            raise Refusal("checkpoint", f"{message.member} is not asked to keep {message.checkpoint[:60]}")
        if not {name for name, _, _ in message.files} <= {ABOUT, TENSORS}:
            raise Refusal("checkpoint", "these are no files of a script's")
        if not self.keeping[2].done():
            self.keeping[2].set_result(message)
        return Ok()

    async def end(self, because: str) -> None:
        """The last one, when the last worker has gone."""
        if self.last is None:
            if self.looking is not None:
                self.looking.cancel()
            self.last = asyncio.ensure_future(self.take(because, moves=False))
        await asyncio.shield(self.last)

    def tasks(self) -> list[asyncio.Task[Any]]:
        return [task for task in (self.looking, self.last) if task is not None]


def describe_ledger(found: Pass | None) -> dict[str, Any]:
    """ledger.json: the open epoch and which of its batches are in the parameters."""
    if found is None:
        return {}
    over = {
        how: [batch for batch, flag in enumerate(found.state) if flag == how] for how in (COMMITTED, SKIPPED)
    }
    return {
        "epoch": found.epoch,
        "batches": found.batches,
        "samples": found.samples,
        "batch_size": found.batch_size,
        "token": found.token.hex(),
        "committed": intervals(over[COMMITTED]),
        "skipped": intervals(over[SKIPPED]),
    }


def describe_job(
    spec: JobSpec, steps: int, ledger: Ledger, noted: Noted | None, course: Course
) -> dict[str, Any]:
    """job.json: what the run was asked for, how far it was, the senior's newest note on its schedules, and how the
    learning rate followed the workers."""
    note = None if noted is None else {"epoch": noted.epoch, "note": noted.note.hex()}
    return {
        "steps": steps,
        "epoch": ledger.epoch,
        "spec": msgspec.to_builtins(spec),
        "note": note,
        "course": msgspec.to_builtins(course.kept()),
    }


def resumed_course(checkpoint: Checkpoint | None) -> Course:
    """Where the learning rate was; of older checkpoints nothing is known."""
    try:
        return msgspec.convert(checkpoint.job["course"], Course) if checkpoint is not None else Course()
    except (KeyError, TypeError, msgspec.ValidationError):
        return Course()


def begun_with(begun: Begun, found: Checkpoint | None, *, going_on: bool) -> Checkpoint | None:
    """What is found, if it is what the job began with. Raises BadCheckpoint where the job is still to begin with that:
    later it needs nothing of it here."""
    if found is None or (begun.manifest and found.manifest.xxh3 != begun.manifest):
        if begun.begin_with and not going_on:
            raise BadCheckpoint(Path(begun.begin_with), MANIFEST, "is not the one that the job began with")
        return None
    return found


def resumed_note(checkpoint: Checkpoint) -> Noted | None:
    """The note of the run before; None where it has none that can be read."""
    try:
        return Noted(int(checkpoint.job["note"]["epoch"]), bytes.fromhex(checkpoint.job["note"]["note"]))
    except (KeyError, TypeError, ValueError):
        return None


def applied_batches(
    applied: Mapping[str, Applied], incarnations: Mapping[WorkerId, int]
) -> dict[WorkerId, tuple[int, int]]:
    """(epoch, done) by worker, as `Ledger.at_cut` wants it."""
    return {
        WorkerId(worker): (epoch, done)
        for worker, (_, epoch, done, incarnation) in applied.items()
        if incarnations.get(WorkerId(worker)) == incarnation  # a former self was settled when it was lost
    }


class LedgerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ledger.json."""

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    batch_size: int = 0
    token: str = ""
    committed: list[tuple[int, int]] = []
    skipped: list[tuple[int, int]] = []


def resumed_ledger(checkpoint: Checkpoint) -> calls.Resume | None:
    """What makes a new ledger go on where the checkpoint's was. ValueError if it cannot be read."""
    if not checkpoint.ledger:
        return None
    state = msgspec.convert(checkpoint.ledger, LedgerState)
    if not 0 <= state.batches <= MOST_BATCHES:
        raise ValueError(f"an epoch of {state.batches} batches")

    def spread(found: list[tuple[int, int]]) -> tuple[int, ...]:
        return tuple(b for first, last in found for b in range(max(first, 0), min(last + 1, state.batches)))

    return calls.Resume(
        state.epoch,
        state.batches,
        bytes.fromhex(state.token),
        spread(state.committed),
        spread(state.skipped),
        state.samples,
        state.batch_size,
    )


def why_not_this_model(checkpoint: Checkpoint, registration: bytes) -> str:
    """What keeps a script's model from going on with a checkpoint's parameters; empty when nothing does."""
    try:
        shown = Registration.from_bytes(registration)
    except BadLayout as bad:
        return str(bad)
    held = checkpoint.registration
    if shown.optimizer.name != held.optimizer.name:
        return f"it was made with {held.optimizer.name} on the shards, and the script shows {shown.optimizer.name}"
    if shown.layout != held.layout:
        ours = {(p.name, p.shape, p.group) for p in shown.layout.parameters}
        theirs = {(p.name, p.shape, p.group) for p in held.layout.parameters}
        different = sorted(name for name, _, _ in ours ^ theirs)
        return f"the models differ in {', '.join(different[:4]) or 'the order of their parameters'}"
    return ""
