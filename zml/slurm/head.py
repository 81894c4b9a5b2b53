"""`zml slurm head`: the batch step. It starts every member as a step of the allocation, and sees the job to its end.

Rules: whose death the coordinator knows of, and who has not left in order, is started again, a few times
(`launch.revival`): where it was; a shard elsewhere, if its node is gone or silent. A worker whose node is gone stays
away: its GPU is too, and the others take over its batches. The first SIGTERM drains the job, the second ends it. No
step is left.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from ..config import Settings
from ..errors import BOOK, EX_TEMPFAIL, LOST, NOT_FORMED, ZmlError
from ..launch.child import Child
from ..launch.local import Observer
from ..launch.revival import CRASHED, Revivals
from ..runs import rundir
from ..status import JobStatus
from ..text import console
from . import step
from .shape import COORDINATOR, Shape, another_place
from .steps import Steps

START_S = 120.0  # for a step to be created and the coordinator to listen
GOODBYE_S = 15.0  # for members to end after the job
LOOK_EVERY_S = 0.5
ASK_S = 12.0
DRAIN_ASK_S = 20.0
SILENT_S = 90.0  # a coordinator that runs and answers nobody for so long will not any more
LOST_S = 1.0  # a shard that is lost does not come back by itself; its step may go on for minutes where its node is dead
BY_SIGNAL = 128  # an exit code beyond it is srun's way to say so
KILLED = -signal.SIGKILL  # as what every death counts with `Revivals`: srun does not say how a process died

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run. `program` runs a role, and ends with its name; `address` is where the coordinator listens."""

    settings: Settings  # of the job, with its keys
    run: Path
    script: str
    args: Sequence[str]
    shape: Shape
    nodes: Sequence[str]
    address: str
    program: Sequence[str]
    interface: str = ""
    srun: Sequence[str] = ()  # more options of every step


class Head:
    """One attempt. `left` says which nodes the allocation still has, and may raise ZmlError."""

    def __init__(
        self,
        job: Job,
        environment: Mapping[str, str],
        viewer: console.Viewer,
        observer: Observer,
        left: Callable[[], list[str]],
    ) -> None:
        self.job = job
        self.settings = job.settings
        self.viewer = viewer
        self.observer = observer
        self.left = left
        self.woken = asyncio.Event()
        self.steps = Steps(job.run / rundir.LOGS, environment, self.woken, self._script_line)
        self.places = job.shape.placed(job.nodes)
        self.revivals = Revivals(job.settings)
        self.given_up: set[str] = set()
        self.lost_since: dict[
            str, float
        ] = {}  # by the loop's clock, of those that the coordinator calls lost
        self.nodes_lost = False
        self.begun = False
        self.told = 0  # so many times to go
        self.killed = ""  # why, once it is so
        self.code = EX_TEMPFAIL  # then
        self.state = ""  # of the job, as last heard
        self.draining: asyncio.Task[None] | None = None
        self.link: Any = None

    async def run(self) -> int:
        """To the end; the job's exit code. Raises ZmlError where it did not form, or the coordinator was lost."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.go, number.name)
        try:
            code = await self._to_the_end()
        finally:
            if self.draining is not None:
                self.draining.cancel()
            await self._hang_up()
            await self.steps.end_all()
        return code

    async def _to_the_end(self) -> int:
        if not await self._start():
            return EX_TEMPFAIL
        status = await self._watch()
        if self.killed and status is None:
            return self.code
        if status is None:
            raise ZmlError(
                LOST, f"the coordinator {self.steps.now[COORDINATOR].how()}", self._see(COORDINATOR)
            )
        members = {member.member for member in status.members}
        for member in self.steps.now.keys() - members - {COORDINATOR}:
            self.steps.end(member)  # it was still loading, and would wait for a coordinator that is gone
        late = await self.steps.wait(GOODBYE_S)
        if late:
            self.viewer.say(f"ending {console.names(late)}: still there {GOODBYE_S:g} s after the job")
        return status.exit_code if status.exit_code is not None else 1

    # -- starting --------------------------------------------------------------------------------------------

    async def _start(self) -> bool:
        """False if it was told to go meanwhile."""
        await self._launch(COORDINATOR)
        addresses = await self._addresses()
        if addresses is None:
            return False
        self.settings = replace(self.settings, coordinator=addresses)
        for member in self.places:
            if member != COORDINATOR:
                await self._launch(member)
        return not self.killed

    async def _launch(self, member: str, *, again: bool = False) -> None:
        shape = self.job.shape
        needs = shape.needs(member)
        role = [
            *self.job.program,
            *(["--interface", self.job.interface] if self.job.interface else []),
            *(["--gpu"] if needs.gpus else []),
            str(self.job.run),
            *(() if member == COORDINATOR else self.settings.coordinator),
            "--",
            *self._arguments(member, needs.gpus > 0),
        ]
        command = step.command(member, self.places[member], needs, role, again=again, more=self.job.srun)
        await self.steps.start(member, command, needs.cpus if member.startswith("w") else None)

    def _arguments(self, member: str, has_gpu: bool) -> list[str]:
        there = ["--run-dir", str(self.job.run)]
        if member == COORDINATOR:
            bind = ["--bind", f"tcp://{self.job.address}:0"]
            http = ["--http", self.settings.http]
            return [COORDINATOR, *there, *http, *bind, "--", self.job.script, *self.job.args]
        at = [part for address in self.settings.coordinator for part in ("--coordinator", address)]
        if member.startswith("p"):
            return ["ps", "--shard", member[1:], *at, "--bind", "tcp://{here}:0", *there]
        return ["worker", *([] if has_gpu else ["--cpu"]), "--name", member, *at, *there]

    async def _addresses(self) -> tuple[str, ...] | None:
        """Where the coordinator listens; None if it was told to go. Raises ZmlError."""
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        while (found := rundir.listening(self.job.run)) is None:
            child = self.steps.now[COORDINATOR]
            if self.killed:
                return None
            if child.ended:
                await asyncio.wait([child.copying], timeout=GOODBYE_S)
                raise ZmlError(NOT_FORMED, f"the coordinator {child.how()}", self._see(COORDINATOR))
            if loop.time() > until:
                what = f"the coordinator does not listen after {START_S:g} s"
                raise ZmlError(NOT_FORMED, what, self._see(COORDINATOR))
            await self._pause(0.05)
        return tuple(found.addresses)

    # -- watching --------------------------------------------------------------------------------------------

    async def _watch(self) -> JobStatus | None:
        """Until the job is over; how it ended, None if that is not known."""
        loop = asyncio.get_running_loop()
        started = heard = loop.time()
        while not self.killed:
            self.woken.clear()
            if self.steps.now[COORDINATOR].ended:
                if (over := rundir.last_status(self.job.run)) is not None:
                    return over
                if not has_died(self.steps.now[COORDINATOR]) or not await self._revive(COORDINATOR):
                    return None
                heard = loop.time()
            status = await self._look()
            if status is not None:
                heard = loop.time()
                self.viewer.show(status)
                self.state = status.state
                self.begun = self.begun or status.state != "FORMING"
                if status.over:
                    await self._coordinator_ends()
                    return rundir.last_status(self.job.run) or status
                if status.state in ("FORMING", "RUNNING"):
                    await self._mend(status, loop.time())
                if not self.begun and loop.time() - started > START_S + self.settings.join_timeout_s:
                    raise self._not_formed(status)
            elif loop.time() - heard > SILENT_S:
                raise ZmlError(
                    LOST, f"the coordinator has not answered for {SILENT_S:g} s", self._see(COORDINATOR)
                )
            await self._pause(LOOK_EVERY_S)
        return rundir.last_status(self.job.run)

    def _not_formed(self, status: JobStatus) -> ZmlError:
        here = {member.member for member in status.members}
        missing = [member for member in self.places if member not in here and member != COORDINATOR]
        limit_s = START_S + self.settings.join_timeout_s
        what = f"{console.names(missing)} did not join within {limit_s:g} s"
        return ZmlError(NOT_FORMED, what, self._see(missing[0]) if missing else "")

    async def _mend(self, status: JobStatus, now: float) -> None:
        """Start again what has died."""
        states = {each.member: each.state for each in status.members}
        for member, child in list(self.steps.now.items()):
            if member == COORDINATOR or member in self.given_up:
                continue
            state = states.get(member, "")
            if state == "lost":
                since = self.lost_since.setdefault(member, now)
                if not child.ended and not is_silent(member, child.started_at, since, now):
                    continue  # srun tells when Slurm knows; an agent that was frozen comes back by itself
                await self._revive(member)
            else:
                self.lost_since.pop(member, None)
                if child.ended and state == "":  # it never joined
                    await self._revive(member)

    async def _revive(self, member: str) -> bool:
        """Start it again if that is worth it; says so."""
        child = self.steps.now[member]
        loop = asyncio.get_running_loop()
        silent = not child.ended
        if not silent:
            await asyncio.wait([child.copying], timeout=GOODBYE_S)
        how = "is silent" if silent else child.how()
        place = await self._place(member, silent=silent)
        if place is None:
            self.given_up.add(member)
            self.viewer.say(
                f"{member} is gone with its node {self.places[member]}; the others go on without it"
            )
            return False
        again = self.revivals.decide(member, KILLED, (), loop.time() - child.started_at)
        if again is None:
            self.given_up.add(member)
            self.viewer.say(f"{member} {how}, and is not started again: that was often enough")
            return False
        where = f" on {place}" if place != self.places[member] else ""
        self.viewer.say(f"{member} {how}; starting it again{where} ({again.number} of {again.most})")
        if member == COORDINATOR:
            await self._hang_up()
        self.steps.end(member)
        await self._pause_for(again.after_s)
        if self.killed:
            return False
        self.places[member] = place
        await self._launch(member, again=True)
        return True

    async def _place(self, member: str, *, silent: bool) -> str | None:
        """Where to start it again; None where it cannot be."""
        node = self.places[member]
        try:
            left = await asyncio.to_thread(self.left)
        except ZmlError as error:
            log.warning("which nodes are left is not known", because=error.what)
            left = list(self.job.nodes)
        if node not in left:
            self.nodes_lost = True
        elif not silent:
            return node
        if not member.startswith("p"):
            return None
        troubled = {self.places[other] for other in self.lost_since}
        good = [each for each in left if each not in troubled] or left
        elsewhere = another_place(member, self.places, good, node)
        return elsewhere or (node if node in left else None)

    async def _coordinator_ends(self) -> None:
        """It writes down how the job ended, last of all."""
        try:
            await asyncio.wait_for(self.steps.now[COORDINATOR].gone.wait(), GOODBYE_S)
        except TimeoutError:
            pass

    async def _look(self) -> JobStatus | None:
        """The job's status; None when the coordinator ended or does not answer."""
        try:
            return await asyncio.wait_for(self._ask(), ASK_S)
        except (ZmlError, TimeoutError):
            await self._hang_up()
            return None

    async def _ask(self) -> JobStatus:
        return await self.observer.status(await self._connection())

    async def _connection(self) -> Any:
        if self.link is None:
            self.link = await self.observer.connect(self.settings)
        return self.link

    async def _hang_up(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            await link.close()

    # -- ending ----------------------------------------------------------------------------------------------

    def go(self, name: str) -> None:
        """The first signal drains, if there is anything to drain; the second ends."""
        self.told += 1
        if not self.begun:
            self._kill(f"{name}, before the job had begun")
        elif self.told == 1:
            self.draining = asyncio.ensure_future(self._drain(name))
        else:
            self.code = 128 + signal.SIGTERM
            self._kill(f"{name}, again")
        self.woken.set()

    async def _drain(self, name: str) -> None:
        """Ask the coordinator for an orderly end, which it may know of already; without one, end without order."""
        self.viewer.say(f"{name}: draining, the workers finish their step and the shards write a checkpoint")
        loop = asyncio.get_running_loop()
        until = loop.time() + DRAIN_ASK_S
        settings, link = self.settings, None
        while True:
            try:
                link = await self.observer.connect(settings)
                await asyncio.wait_for(self.observer.drain(link, f"{name} at the batch script"), ASK_S)
                break
            except (ZmlError, TimeoutError) as error:
                if rundir.last_status(self.job.run) is not None:
                    return
                if loop.time() + LOOK_EVERY_S >= until:
                    return self._kill(f"the coordinator could not be asked to drain: {error}")
            finally:
                if link is not None:
                    await link.close()
                    link = None
            await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(self.settings.drain_s)
        if self.state in (
            "RUNNING",
            "DRAINING",
        ):  # else shards write the last checkpoint, and have a deadline of their own
            self._kill(f"the drain is not over after {self.settings.drain_s:g} s")

    def _kill(self, because: str) -> None:
        if not self.killed:
            self.killed = because
            self.viewer.say(f"stopping now: {because}")
        self.woken.set()

    # -- words -----------------------------------------------------------------------------------------------

    def _script_line(self, member: str, line: str) -> None:
        if self.settings.keep_output == "all":
            self.viewer.script_line(f"{member} | {line}")
        elif self.settings.keep_output == "first" and member == self._speaker():
            self.viewer.script_line(line)

    def _speaker(self) -> str:
        """The first worker that is there, so that a run does not fall silent."""
        workers = sorted((m for m in self.steps.now if m.startswith("w")), key=lambda m: int(m[1:]))
        return next((m for m in workers if is_here(self.steps.now[m])), "")

    def _see(self, member: str) -> str:
        return f"Its log is {self.job.run / rundir.LOGS / member}.log."

    async def _pause_for(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (rest := until - loop.time()) > 0 and not self.killed:
            await asyncio.sleep(min(rest, LOOK_EVERY_S))

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.woken.wait(), seconds)
        except TimeoutError:
            return


def is_here(child: Child) -> bool:
    return child.process.returncode in (None, 0)


def has_died(coordinator: Child) -> bool:
    """Or has it ended by itself, because of what it was given? It would do so again."""
    code = coordinator.process.returncode or 0
    return code > BY_SIGNAL or code in (CRASHED, BOOK[LOST].exit_code)


def is_silent(member: str, started_at: float, lost_since: float, now: float) -> bool:
    """Is a lost member's step, which goes on, not worth waiting for? All times by one clock.

    One that was started in its place has to load torch and to read the push log first.
    """
    if not member.startswith("p"):
        return False
    return now - lost_since >= LOST_S if started_at < lost_since else now - started_at >= START_S
