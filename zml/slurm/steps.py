"""The steps of an allocation as running srun processes: started, watched, told to go, and none left behind.

Rules: a step's end is seen at once; what is printed goes to the member's log in the run directory, but for the lines
of the script that are to be shown; SIGUSR1 to srun reaches the member, SIGTERM ends the step.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..launch.child import Child, lines_of, spawn
from ..logs.printed import Printed

LAST_LINES = 5
ENDED_S = 5.0  # for the last lines of a step that has ended
KILL_S = 15.0  # for srun to end its step
# What srun says of every step that does not end with 0, in our own words elsewhere.
CHATTER = ("srun: Job ", "srun: job ", "srun: Step created", "srun: launch/slurm", "srun: Force Terminated")


class Steps:
    """`show` gets (member, line) of what scripts print; `woken` is set whenever a step has ended."""

    def __init__(
        self,
        logs: Path,
        environment: Mapping[str, str],
        woken: asyncio.Event,
        show: Callable[[str, str], None],
    ) -> None:
        self.logs = logs
        self.environment = environment
        self.woken = woken
        self.show = show
        self.now: dict[str, Child] = {}  # the newest step of each member
        self.watching: set[asyncio.Task[None]] = set()
        self.former: list[Child] = []  # those in whose place another one was started, and that may hang

    async def start(self, member: str, command: Sequence[str], threads: int | None = None) -> Child:
        told = dict(self.environment)
        if threads is not None:
            told.setdefault("OMP_NUM_THREADS", str(threads))
        process, gone = await spawn(command, told)
        last: list[str] = []
        copying = asyncio.ensure_future(self._copy(member, process, last))
        now = asyncio.get_running_loop().time()
        child = Child(member, command, threads, now, process, gone, last, copying)
        if member in self.now and not self.now[member].ended:
            self.former.append(self.now[member])
        self.now[member] = child
        watching = asyncio.ensure_future(self._watch(child))
        self.watching.add(watching)
        watching.add_done_callback(self.watching.discard)
        return child

    async def _watch(self, child: Child) -> None:
        await child.gone.wait()
        self.woken.set()

    async def _copy(self, member: str, process: asyncio.subprocess.Process, last: list[str]) -> None:
        assert process.stdout is not None and process.stderr is not None
        printed = Printed.of_member(self.logs, member, "", process.pid)

        async def keep(name: str, stream: asyncio.StreamReader) -> None:
            async for line in lines_of(stream):
                if line.startswith(CHATTER):
                    continue
                last.append(line.removeprefix("srun: error: "))
                del last[:-LAST_LINES]
                printed.line(name, line)

        async def shown(stream: asyncio.StreamReader) -> None:
            async for line in lines_of(stream):
                self.show(member, line)

        is_worker = member.startswith("w")
        try:
            await asyncio.gather(
                shown(process.stdout) if is_worker else keep("stdout", process.stdout),
                keep("stderr", process.stderr),
            )
        finally:
            printed.close()

    def leave(self, members: Sequence[str]) -> None:
        """They are to go in order."""
        for member in members:
            if (child := self.now.get(member)) is not None and not child.ended:
                child.process.send_signal(signal.SIGUSR1)

    def end(self, member: str) -> None:
        """Its step is not to go on; srun sees to that by itself, and may take a while where the node is dead."""
        if (child := self.now.get(member)) is not None and not child.ended:
            child.process.terminate()

    async def wait(self, seconds: float) -> list[str]:
        """Until all have ended; the members that have not in time."""
        waits = {member: asyncio.ensure_future(child.gone.wait()) for member, child in self.now.items()}
        if waits:
            await asyncio.wait(waits.values(), timeout=seconds)
        late = [member for member, wait in waits.items() if not wait.done()]
        for wait in waits.values():
            wait.cancel()
        return late

    async def end_all(self) -> None:
        """SIGTERM to every srun, which kills its step; then SIGKILL: Slurm ends the rest with the job."""
        left = [child for child in (*self.now.values(), *self.former) if not child.ended]
        for child in left:
            child.process.terminate()
        if left:
            await asyncio.wait([asyncio.ensure_future(child.gone.wait()) for child in left], timeout=KILL_S)
        for child in left:
            if not child.ended:
                child.process.kill()
        copying = [child.copying for child in (*self.now.values(), *self.former)]
        if copying:
            _, pending = await asyncio.wait(copying, timeout=ENDED_S)
            for task in pending:
                task.cancel()
