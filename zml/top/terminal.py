"""The terminal of `zml top`: keys without waiting for a line, a screen of its own, and everything as it was at the end.

Rule: whatever ends the watching, an exception or a signal too, the terminal gets back its modes, its screen and its
cursor. Ctrl-Z gives them back as well, and takes them again when the shell lets us go on.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .keys import decode

ESCAPE_S = 0.05  # within which the rest of a key's sequence comes
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
WATCHED = (*ENDING, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)


class Terminal:
    """To be entered and left as a context, in the main thread."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.keys = sys.stdin.fileno()
        self.screen = sys.stdout.fileno()
        self.live: Live | None = None
        self.modes: list[Any] | None = None
        self.rest = b""
        self.pending: list[int] = []  # signals that came and were not acted on
        self.before: dict[int, Any] = {}
        self.wake_r, self.wake_w = os.pipe()
        os.set_blocking(self.wake_r, False)
        os.set_blocking(self.wake_w, False)
        self.wakeup_before = -1

    def __enter__(self) -> Terminal:
        try:
            for number in WATCHED:
                self.before[number] = signal.signal(number, self._signalled)
            self.wakeup_before = signal.set_wakeup_fd(self.wake_w, warn_on_full_buffer=False)
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._give_back()
        finally:
            signal.set_wakeup_fd(self.wakeup_before)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            self.before = {}
            os.close(self.wake_r)
            os.close(self.wake_w)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        self.pending.append(number)

    def _take(self) -> None:
        self.modes = termios.tcgetattr(self.keys)
        tty.setcbreak(self.keys, termios.TCSADRAIN)  # Ctrl-C and Ctrl-Z stay signals
        self.live = Live(
            console=self.console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start()

    def _give_back(self) -> None:
        """Of a terminal that is gone there is nothing to give back."""
        live, self.live = self.live, None
        modes, self.modes = self.modes, None
        try:
            if live is not None:
                with suppress(OSError):
                    live.stop()
        finally:
            if modes is not None:
                with suppress(termios.error):
                    termios.tcsetattr(self.keys, termios.TCSADRAIN, modes)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines, as they are now."""
        try:
            found = os.get_terminal_size(self.screen)
        except OSError:  # it is gone; a signal says so
            return 80, 24
        return found.columns or 80, found.lines or 24

    def draw(self, lines: Sequence[Text], width: int, height: int) -> None:
        if self.live is None:
            return
        self.console.size = (width, height)
        self.live.update(Group(*lines), refresh=True)

    def wake(self) -> None:
        """There is something new to draw. For other threads."""
        try:
            os.write(self.wake_w, b"\0")
        except (BlockingIOError, OSError):  # it is awake, or over
            return

    def wait(self, seconds: float) -> tuple[list[str], int]:
        """Until a key, a signal, `wake`, or so long; the keys, and the signal that ends it all, or 0."""
        ready, _, _ = select.select([self.keys, self.wake_r], [], [], seconds)
        if self.wake_r in ready:
            self._drain()
        keys = self._read() if self.keys in ready else []
        return keys, self._act()

    def _drain(self) -> None:
        try:
            while os.read(self.wake_r, 4096):
                continue
        except BlockingIOError:
            return

    def _read(self) -> list[str]:
        try:
            data = os.read(self.keys, 4096)
        except OSError:
            data = b""
        if not data:  # nobody can press a key any more
            self.pending.append(signal.SIGHUP)
            return []
        keys, self.rest = decode(self.rest + data, final=False)
        while self.rest:
            more, _, _ = select.select([self.keys], [], [], ESCAPE_S)
            data = os.read(self.keys, 4096) if more else b""
            found, self.rest = decode(self.rest + data, final=not data)
            keys += found
        return keys

    def _act(self) -> int:
        """On the signals that came, in their order."""
        while self.pending:
            number = self.pending.pop(0)
            if number in ENDING:
                return number
            if number == signal.SIGTSTP:
                self._stand_aside()
            elif number == signal.SIGCONT and self.live is not None:
                self._give_back()  # whoever stopped us without a word may have changed the modes
                self._take()
        return 0

    def _stand_aside(self) -> None:
        self._give_back()
        mine = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # here it stands still, until SIGCONT
        signal.signal(signal.SIGTSTP, mine)
        self._take()
