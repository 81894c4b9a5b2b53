"""The same as `provider`, with processes of this machine: to try a policy where there is no Slurm.

Rule: what it starts ends with `close`, at the latest.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from itertools import count

from ..errors import USAGE, ZmlError
from .table import Allocation, State

KILLED_S = 5.0  # for the kernel to end what was killed


class LocalProvider:
    """Each allocation is a process group."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        if not command:
            raise ZmlError(USAGE, "an allocation needs a command", "Give one.")
        self.command = list(command)
        self.environ = dict(os.environ if environ is None else environ)
        self.numbers = count(1)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.released: set[str] = set()

    def ask(self, count: int) -> list[str]:
        asked: list[str] = []
        for _ in range(count):
            try:
                process = subprocess.Popen(
                    self.command, env=self.environ, stdin=subprocess.DEVNULL, process_group=0
                )
            except OSError as error:
                if asked:
                    break
                raise ZmlError(
                    USAGE, f"cannot run {self.command[0]}: {error.strerror}", "Check it."
                ) from None
            id = str(next(self.numbers))
            self.processes[id] = process
            asked.append(id)
        return asked

    def release(self, id: str, *, now: bool = False) -> None:
        process = self.processes.get(id)
        if process is None or process.poll() is not None:
            return
        if now:
            self.released.add(id)
            _kill(process)
        elif id not in self.released:
            self.released.add(id)
            process.terminate()

    def look(self) -> list[Allocation]:
        return [self._seen(id, process) for id, process in self.processes.items()]

    def _seen(self, id: str, process: subprocess.Popen[bytes]) -> Allocation:
        code = process.poll()
        if code is None:
            return Allocation(id, State.RUNNING)
        if code == 0 or id in self.released:
            return Allocation(id, State.ENDED)
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        return Allocation(id, State.FAILED, how)

    def forget(self, id: str) -> None:
        if id in self.processes and self.processes[id].poll() is not None:
            del self.processes[id]

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                _kill(process)
                process.wait(KILLED_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started: a group's number is its own while its first process is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
