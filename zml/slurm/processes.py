"""The same as `provider`, with processes of this machine: to try a policy where there is no Slurm.

Rule: what it starts ends with `close`, at the latest; also what another thread was about to start.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count

from ..errors import USAGE, ZmlError
from .table import Allocation, State

KILLED_S = 5.0  # for the kernel to end what was killed
ID = "{id}"  # in the command: the allocation's own


class LocalProvider:
    """Each allocation is a process group."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        if not command:
            raise ZmlError(USAGE, "an allocation needs a command", "Give one.")
        self.command = list(command)
        self.environ = dict(os.environ if environ is None else environ)
        self.mark = secrets.token_hex(4)  # what another process of this kind has started has other ids
        self.numbers = count(1)
        self.lock = threading.Lock()
        self.closed = False
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.released: set[str] = set()

    def ask(self, count: int) -> list[str]:
        asked: list[str] = []
        for _ in range(count):
            with self.lock:
                if self.closed:
                    break
                id = f"{self.mark}-{next(self.numbers)}"
                words = [word.replace(ID, id) for word in self.command]
                try:
                    self.processes[id] = subprocess.Popen(
                        words, env=self.environ, stdin=subprocess.DEVNULL, process_group=0
                    )
                except OSError as error:
                    if asked:
                        break
                    raise ZmlError(USAGE, f"cannot run {words[0]}: {error.strerror}", "Check it.") from None
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
        with self.lock:
            there = list(self.processes.items())
        return [self._seen(id, process) for id, process in there]

    def _seen(self, id: str, process: subprocess.Popen[bytes]) -> Allocation:
        code = process.poll()
        if code is None:
            return Allocation(id, State.RUNNING)
        if code == 0 or id in self.released:
            return Allocation(id, State.ENDED)
        how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        return Allocation(id, State.FAILED, how)

    def forget(self, id: str) -> None:
        with self.lock:
            if id in self.processes and self.processes[id].poll() is not None:
                del self.processes[id]

    def close(self) -> None:
        with self.lock:
            self.closed = True
            left = [process for process in self.processes.values() if process.poll() is None]
        for process in left:
            _kill(process)
        for process in left:
            # The kernel may not have come to it: the others are not to wait.
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started: a group's number is its own while its first process is not waited for."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
