"""How an agent asks its script to leave the job, and how the script says that it has: lines over a pair of sockets.

    agent -> script    leave BECAUSE    finish the step, let everything leave, come to an end
                       stop             end now
    script -> agent    left             nothing of this worker is in flight, and it asks nothing of the job any more

Rule: it works whatever the script's main thread does, and whether or not the coordinator can be reached, so neither a
signal (Python runs handlers between two lines of the main thread only) nor a message of the job will do. The script's
end is read in its I/O thread. Signals that reach the script itself, as Slurm and systemd send them to everybody, mean
the same where the user's code has no handler of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, MutableMapping
from types import FrameType

VARIABLE = "ZML_LEAVE"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MOST_BYTES = 400  # of a reason: it fits the socket's buffer, and no write ever waits
STOPPED = 128 + signal.SIGTERM


class AgentEnd:
    """The agent's end. `left` is called once, in the loop, when the script says so."""

    def __init__(self, left: Callable[[], None]) -> None:
        self.left = left
        self.socket, self.other = socket.socketpair()
        self.socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self.socket, self._heard)

    @property
    def pass_fds(self) -> tuple[int]:
        """What the child must inherit; `environment` tells it the number."""
        return (self.other.fileno(),)

    def environment(self) -> dict[str, str]:
        return {VARIABLE: str(self.other.fileno())}

    def ask(self, because: str) -> None:
        self._send(f"leave {because}")

    def stop(self) -> None:
        self._send("stop")

    def close(self) -> None:
        """Twice is the same as once."""
        if self.socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self.socket)
        self.socket.close()
        self.other.close()

    def _send(self, line: str) -> None:
        try:
            self.socket.send(line.encode()[:MOST_BYTES] + b"\n")
        except OSError:
            pass  # the script has ended, or reads nothing: the agent's patience is limited anyway

    def _heard(self) -> None:
        try:
            told = self.socket.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            asyncio.get_running_loop().remove_reader(self.socket)
        elif b"left" in told:
            self.left()


class ScriptEnd:
    """The script's end; without an agent that listens, nothing is heard and nothing told.

    `asked` is called with the reason: in the I/O thread, or in a handler of the main thread.
    """

    def __init__(self, asked: Callable[[str], None], environ: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self.asked = asked
        self.pid = os.getpid()
        self.signals = 0
        self.before_stop: Callable[[], None] = lambda: None  # takes no longer than a moment
        self.rest = b""
        number = environ.pop(VARIABLE, "")  # it is for nobody whom the script starts
        self.socket = socket.socket(fileno=int(number)) if number.isdigit() else None

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the I/O thread."""
        if self.socket is not None:
            self.socket.setblocking(False)
            loop.add_reader(self.socket, self._heard, loop)

    def catch(self) -> None:
        """In the main thread: signals mean to leave, where they would have killed."""
        if threading.current_thread() is not threading.main_thread():
            return
        ours = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
        for number in ours:
            signal.signal(number, self._signalled)
        # Loaders end their worker processes with SIGTERM.
        os.register_at_fork(after_in_child=lambda: restore(ours, self._signalled))

    def left(self) -> None:
        try:
            if self.socket is not None:
                self.socket.send(b"left\n")
        except OSError:
            pass  # the agent is gone, and this process will be, too

    def _heard(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self.socket is not None
        try:
            told = self.socket.recv(4 * MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            told = b""
        if not told:
            loop.remove_reader(self.socket)
        *lines, self.rest = (self.rest + told).split(b"\n")
        for line in lines:
            word, _, because = line.decode(errors="replace").partition(" ")
            if word == "leave":
                self.asked(because)
            elif word == "stop" and signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, self._signalled):
                self.before_stop()
                os._exit(STOPPED)  # as SIGTERM would have done, had we not caught it

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1
        # The second time it means what it always did; and so it does in a process that was forked just now.
        if self.signals > 1 or os.getpid() != self.pid:
            restore([number], self._signalled)
            os.kill(os.getpid(), number)
        self.asked(signal.Signals(number).name)


def restore(numbers: Iterable[int], handler: object) -> None:
    """The default action, where the handler is still ours."""
    for number in numbers:
        if signal.getsignal(number) == handler:
            signal.signal(number, signal.SIG_DFL)
