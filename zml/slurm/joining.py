"""An allocation of its own that only brings further workers into a job that is going on: `zml slurm script --join
RUN`.

Rules: its workers get the names that the coordinator gives; told to go they leave in order, and the job trains on. A
worker that is killed is started again, a few times. The allocation ends with the job, or when its last worker has
left.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Settings
from ..errors import EX_TEMPFAIL
from ..launch.revival import Revivals
from ..runs import rundir
from ..text import console
from . import step
from .shape import COORDINATOR, Shape
from .steps import Steps

LEAVE_MORE_S = 15.0  # beyond drain_s, for the goodbye
LOOK_EVERY_S = 5.0
KILLED = -signal.SIGKILL
BY_SIGNAL = 128  # an exit code beyond it: srun's way to say so


@dataclass(frozen=True, slots=True)
class Reinforcement:
    """`logs`: where the members' own logs go."""

    settings: Settings
    run: Path
    logs: Path
    shape: Shape
    nodes: Sequence[str]
    program: Sequence[str]
    srun: Sequence[str] = ()


class Joining:
    """One attempt."""

    def __init__(self, plan: Reinforcement, environment: Mapping[str, str], viewer: console.Viewer) -> None:
        self.plan = plan
        self.viewer = viewer
        self.woken = asyncio.Event()
        self.steps = Steps(plan.logs, environment, self.woken, lambda member, line: None)
        self.places = plan.shape.placed(plan.nodes)
        self.revivals = Revivals(plan.settings)
        self.told = 0

    async def run(self) -> int:
        """0 with the job, 75 if told to go, else the first worker's exit code that is none of them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.go, number.name)
        members = [member for member in self.places if member != COORDINATOR]
        try:
            for member in members:
                await self._launch(member)
            while True:
                self.woken.clear()
                for member in members:
                    await self._revive_if_killed(member)
                if all(self.steps.now[member].ended for member in members):
                    break
                try:
                    await asyncio.wait_for(self.woken.wait(), LOOK_EVERY_S)
                except TimeoutError:
                    pass
        finally:
            await self.steps.end_all()
        codes = [self.steps.now[member].process.returncode or 0 for member in members]
        if self.told or (rundir.last_status(self.plan.run) is None and EX_TEMPFAIL in codes):
            return EX_TEMPFAIL
        return 0 if rundir.last_status(self.plan.run) is not None else next(filter(None, codes), 0)

    async def _launch(self, member: str, *, again: bool = False) -> None:
        settings, needs = self.plan.settings, self.plan.shape.worker
        at = [part for address in settings.coordinator for part in ("--coordinator", address)]
        flags = [] if needs.gpus else ["--cpu"]
        arguments = ["worker", *flags, *at, "--run-dir", str(self.plan.run)]
        role = [
            *self.plan.program,
            *(["--gpu"] if needs.gpus else []),
            str(self.plan.run),
            *settings.coordinator,
            "--",
            *arguments,
        ]
        command = step.command(member, self.places[member], needs, role, again=again, more=self.plan.srun)
        await self.steps.start(member, command, needs.cpus)

    async def _revive_if_killed(self, member: str) -> None:
        child = self.steps.now[member]
        code = child.process.returncode
        if code is None or 0 <= code <= BY_SIGNAL or self.told or rundir.last_status(self.plan.run):
            return
        lived_s = asyncio.get_running_loop().time() - child.started_at
        again = self.revivals.decide(member, KILLED, (), lived_s)
        if again is not None:
            self.viewer.say(f"a worker {child.how()}; starting it again ({again.number} of {again.most})")
            await asyncio.sleep(again.after_s)
            await self._launch(member, again=True)

    def go(self, name: str) -> None:
        """The first signal lets the workers leave in order, the second ends them."""
        self.told += 1
        members = list(self.steps.now)
        if self.told == 1:
            self.viewer.say(f"{name}: the workers of this allocation leave")
            self.steps.leave(members)
            loop = asyncio.get_running_loop()
            loop.call_later(self.plan.settings.drain_s + LEAVE_MORE_S, self._end)
        else:
            self._end()
        self.woken.set()

    def _end(self) -> None:
        for member in self.steps.now:
            self.steps.end(member)
