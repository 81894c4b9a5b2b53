"""The coordinator's desk for checkpoints. When one is taken is in `checkpoints`, how in `checkpointer`; here they meet
the job.

Rule: the shards stop when the last checkpoint has what they hold.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import RUN_ENDED
from ..messages import Checkpointed, Fetch, Front, Keep, Kept, Message, Piece, Stop, TakeCheckpoint
from ..plan import Plan
from ..scheduler.state import Cause, Finishing
from ..status import CheckpointStatus
from ..transport import Refusal
from .checkpoints import Checkpoints, When, applied_batches, describe_job, describe_ledger
from .cutting import Cut
from .depot import Offer

if TYPE_CHECKING:
    from .coordinator import Coordinator


class CheckpointDesk:
    """One job's. Without `keep` there are none."""

    def __init__(self, hall: Coordinator) -> None:
        self.hall = hall
        self.checkpoints: Checkpoints | None = None
        self.offer = Offer(hall.job, hall.begun.begin_with, hall.begun.manifest, hall.resumed)
        self.asked: set[asyncio.Task[Path | None]] = set()

    def tasks(self) -> list[asyncio.Task[Any]]:
        return [*self.asked, *(self.checkpoints.tasks() if self.checkpoints is not None else [])]

    def keep(self, root: Path, when: When, keep_last: int = 3, keep_every_steps: int = 0) -> None:
        """From now on, into this folder."""
        self.checkpoints = Checkpoints(
            self.hall.job,
            root,
            when,
            holds=self.hall.holds,
            shards=self.hall.shard_desk.holding,
            host=self.hall.homes.host,
            facts=self.at_cut,
            steps=self.steps,
            steps_before=self.hall.begun.steps_before,
            ask_to_keep=self.ask_to_keep,
            until_gone=self.until_gone,
            in_sync=self.hall.spec.staleness == 0,
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
        )
        self.checkpoints.start()

    def status(self) -> CheckpointStatus:
        """The newest, and how it went."""
        return self.checkpoints.checkpointer.told if self.checkpoints is not None else CheckpointStatus()

    def steps(self) -> int:
        """Of the worker that has made the most; asked often."""
        job = self.hall.docket.running
        return self.hall.board.steps(job.members.alive("worker")) if job is not None else 0

    def ask_to_keep(self, checkpoint: str, folder: str) -> str:
        """Let the senior's script write down what only it knows; its name, or empty where there is no such thing or
        nobody."""
        workers, scripts = self.hall.machine.workers(self.hall.job), self.hall.facts.scripts
        if not workers or Plan.of(self.hall.spec).optimizer_on != "worker" or workers[0] not in scripts:
            return ""
        asked = self.hall.endpoint.notify(scripts[workers[0]], Keep(self.hall.job, checkpoint, folder))
        return str(workers[0]) if asked else ""

    async def until_gone(self, member: str) -> None:
        """Until the script that is this member's now is not there any more."""
        hall = self.hall
        script = hall.facts.scripts.get(member)
        while member in hall.machine.workers(hall.job) and hall.facts.scripts.get(member) == script:
            await hall.changed.wait()

    def at_cut(self, front: Front, gone_on: bool) -> Cut | None:
        """What a checkpoint holds beside the shards' parts, where they hold these steps. None while the shards do not
        know all that the ledger knows of workers that are gone: a step of theirs may be done here and not there.
        `gone_on`: training went on after the cut. It is None then, too, where the ledger cannot tell any more what came
        after: another epoch is open than the one that the cut lies in."""
        if not self.hall.rosters.known_at(front.generation):
            return None
        found, ledger = applied_batches(front.applied, self.hall.ledger.incarnations), self.hall.ledger
        if gone_on and ledger.current is not None:
            if not any(epoch == ledger.current.epoch for epoch, _ in found.values()):
                return None
        described = describe_ledger(ledger.at_cut(found, gone_on=gone_on))
        steps = self.hall.board.steps(self.hall.machine.workers(self.hall.job))
        job = describe_job(self.hall.spec, steps, self.hall.ledger, self.hall.facts.noted, front.course)
        return Cut(
            self.hall.facts.registration, self.hall.ledger.epoch, described, job, self.hall.streams.files()
        )

    def stop(self, member: str, because: str) -> None:
        """End this member; a shard when the last checkpoint has what it holds."""
        message = Stop(self.hall.job, because)
        if self.checkpoints is None or not self.ends_well() or member not in self.hall.shard_desk.all:
            self.hall.orders.send(member, message)
            return
        last = asyncio.ensure_future(self.checkpoints.end(RUN_ENDED))
        last.add_done_callback(lambda task: task.cancelled() or self.hall.orders.send(member, message))

    def ends_well(self) -> bool:
        """Are the parameters worth a checkpoint when the job stops?"""
        job = self.hall.docket.running
        return (
            job is not None
            and isinstance(job.phase, Finishing)
            and job.phase.cause in (Cause.WORKERS_DONE, Cause.WORKERS_DRAINED, Cause.SCRIPT_FAILED)
            and bool(self.hall.shard_desk.holding())
        )

    def signalled(self) -> None:
        """SIGUSR2: take a checkpoint now."""
        if self.checkpoints is not None:
            task = asyncio.ensure_future(self.checkpoints.take("SIGUSR2 at the coordinator"))
            self.asked.add(task)
            task.add_done_callback(self.asked.discard)

    async def take(self, message: TakeCheckpoint) -> Message:
        """Somebody asks for one."""
        if self.checkpoints is None:
            raise Refusal("checkpoint", f"job {self.hall.job} keeps no checkpoints")
        path = await self.checkpoints.take(message.because)
        return Checkpointed(str(path or ""))

    async def files(
        self, message: Piece | Kept | Fetch, payload: memoryview | None
    ) -> Message | tuple[Message, bytes | None]:
        """Files of checkpoints, from members and to them."""
        self.hall.admit(message.member, message.incarnation)
        if isinstance(message, Fetch):
            return await self.offer.fetched(message, to_shard=message.member in self.hall.shard_desk.all)
        if self.checkpoints is None:
            raise Refusal("checkpoint", "no checkpoint is being made")
        answer = await self.checkpoints.receive(message, payload if payload is not None else b"")
        self.hall.machine.put_off(self.hall.job, self.hall.docket.now)  # the last one may take long to send
        return answer
