"""The script as a child process of its agent: its output, line by line, how it ended, and its end on request.

Rule: it never outlives its agent, and neither does whatever it has started.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .figures import WorkerFigures
from .leaving import AgentEnd
from .tally import AgentTally, Tally

OUTPUT_S = 2.0  # for what a script has printed to arrive, once it has ended
KILLED_S = 5.0  # for the kernel to end what was killed
LAST_WORDS = 20  # lines of the script's output that a report may quote
LINE_BYTES = 1 << 20


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
        self, command: Sequence[str], folder: str | None, environment: Mapping[str, str], out: Path
    ) -> int:
        """From its start to its end; the exit code, minus n after signal n. Raises OSError if it cannot be started."""
        try:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env={**environment, **self.line.environment(), **self.tally.environment()},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                limit=LINE_BYTES,
                start_new_session=True,
                pass_fds=(*self.line.pass_fds, self.tally.file),
            )
            self.line.other.close()
            copying = asyncio.ensure_future(self._copy_output(self.process, out))
            code = await self.process.wait()
            self.begun = self.tally.read()
            # Processes that the script has started may hold its output open, and must not outlive it.
            await asyncio.wait([copying], timeout=OUTPUT_S)
            _kill_group(self.process.pid)
            copying.cancel()
            return code
        finally:
            self.told = self.tally.figures()
            self.line.close()
            self.tally.close()

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

    async def _copy_output(self, process: asyncio.subprocess.Process, out: Path) -> None:
        """Line by line to our own stdout, to the log, and the last lines into `tail`."""
        assert process.stdout is not None
        with out.open("a", buffering=1, errors="replace") as file:
            while True:
                try:
                    raw = await process.stdout.readline()
                except ValueError:  # a line beyond the limit: its rest follows as further lines
                    continue
                if not raw:
                    return
                # A progress bar rewrites its line with \r: keep what it shows in the end.
                line = raw.decode(errors="replace").rstrip("\r\n").rsplit("\r", 1)[-1]
                self.tail.append(line)
                with suppress(OSError):  # a full disk, a closed terminal: the script goes on
                    file.write(line + "\n")
                    print(line, flush=True)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left
