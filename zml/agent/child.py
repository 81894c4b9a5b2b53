"""The script as a child process of its agent: its output, line by line, how it ended, and its end on request.

Output and errors come through two pipes, so that each line is known to be of the one or the other; lines of both are
in the order in which they arrive here, which may be off by what a script writes within a millisecond.

Rule: it never outlives its agent, and neither does whatever it has started.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from ..figures import WorkerFigures
from ..logs.printed import Piece, Printed, Splitter
from .leaving import AgentEnd
from .tally import AgentTally, Tally

OUTPUT_S = 2.0  # for what a script has printed to arrive, once it has ended
KILLED_S = 5.0  # for the kernel to end what was killed
LAST_WORDS = 20  # lines of the script's output that a report may quote
READ_BYTES = 1 << 16


class Child:
    """One run of the script. `left` is called when it says that it has left the job."""

    def __init__(self, left: Callable[[], None]) -> None:
        self.line = AgentEnd(left)
        self.tally = AgentTally()
        self.begun: Tally | None = None  # how far it had come, once it has ended
        self.told: WorkerFigures | None = None  # its last figures, once it has ended
        self.tail: deque[str] = deque(maxlen=LAST_WORDS)
        self.process: asyncio.subprocess.Process | None = None

    async def run(
        self, command: Sequence[str], folder: str | None, environment: Mapping[str, str], printed: Printed
    ) -> int:
        """From its start to its end; the exit code, minus n after signal n. Raises OSError if it cannot be started."""
        try:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env={**environment, **self.line.environment(), **self.tally.environment()},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                pass_fds=(*self.line.pass_fds, self.tally.file),
            )
            self.line.other.close()
            printed.constant["pid"] = self.process.pid
            streams = {"stdout": self.process.stdout, "stderr": self.process.stderr}
            copying = [
                asyncio.ensure_future(self._copy(name, stream, printed))
                for name, stream in streams.items()
                if stream is not None
            ]
            code = await self.process.wait()
            self.begun = self.tally.read()
            # Processes that the script has started may hold its output open, and must not outlive it.
            await asyncio.wait(copying, timeout=OUTPUT_S)
            _kill_group(self.process.pid)
            for each in copying:
                each.cancel()
            await asyncio.wait(copying)
            return code
        finally:
            self.told = self.tally.figures()
            self.line.close()
            self.tally.close()
            printed.close()

    @property
    def figures(self) -> WorkerFigures | None:
        """What the script has counted; None before it is in the job."""
        return self.told or self.tally.figures()

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def end(self, grace_s: float) -> None:
        """SIGTERM to the script and all it started, then SIGKILL after the grace."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        self.line.stop()  # for a script in which SIGTERM means to leave
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, KILLED_S)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await process.wait()
                return
            except TimeoutError:
                continue

    async def _copy(self, name: str, stream: asyncio.StreamReader, printed: Printed) -> None:
        """One of its streams, until that ends."""
        splitter = Splitter()
        now = asyncio.get_running_loop().time
        try:
            while data := await stream.read(READ_BYTES):
                self._keep(name, splitter.feed(data, now()), printed)
        finally:
            self._keep(name, splitter.end(), printed)

    def _keep(self, name: str, pieces: list[Piece], printed: Printed) -> None:
        """To the run directory, to our own stdout, and the last lines into `tail`."""
        lines = printed.write(name, pieces, self.tally.step())
        self.tail.extend(lines)
        # A full disk, a terminal that is closed or cannot show a character: the script goes on, and is read.
        with suppress(OSError, ValueError):
            if lines:
                print("\n".join(lines), flush=True)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left
