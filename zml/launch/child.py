"""A process of the run, whose end is seen at once: the kernel says when it has ended, whoever holds its pipes open."""

from __future__ import annotations

import asyncio
import resource
import signal
from asyncio.subprocess import PIPE, Process, SubprocessStreamProtocol
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from subprocess import DEVNULL

LINE_BYTES = 65_536


class _Protocol(SubprocessStreamProtocol):
    """`Process.wait` would wait for the pipes too, which processes that this one has started may hold (Python 3.11)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limit=LINE_BYTES, loop=loop)
        self.gone = asyncio.Event()

    def process_exited(self) -> None:
        super().process_exited()
        self.gone.set()


async def spawn(
    command: Sequence[str], environment: Mapping[str, str], folder: str | None = None
) -> tuple[Process, asyncio.Event]:
    """The process, and what is set as soon as it has ended. Raises OSError."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.subprocess_exec(
        lambda: _Protocol(loop),
        *command,
        env=environment,
        cwd=folder,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        process_group=0,  # a Ctrl-C at the terminal is ours to handle
    )
    return Process(transport, protocol, loop), protocol.gone


def hold_to(pid: int, memory_mb: int) -> None:
    """What was asked for is what there is: beyond it the process itself fails to allocate, and not a neighbour.

    RLIMIT_DATA counts private writable memory, as of Linux 4.7; its children inherit it.
    """
    if memory_mb:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))


def how_ended(code: int) -> str:
    """`code` is minus n after signal n."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@dataclass(slots=True)
class Child:
    """`last` are the lines of its own (not its script's) that it printed last."""

    member: str
    arguments: Sequence[str]
    threads: int | None
    started_at: float  # in the loop's time
    process: Process
    gone: asyncio.Event
    last: list[str]
    copying: asyncio.Task[None]
    given_up: bool = False  # it ended, and stays so

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    def how(self) -> str:
        """How it ended, with its last line: it usually says why."""
        code = self.process.returncode
        assert code is not None
        text = how_ended(code)
        errors = [line.removeprefix("error: ") for line in self.last if line.startswith("error: ")]
        said = [*self.last, *errors][-1:]
        return f"{text}: {said[0].strip()}" if said else text


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their ends; a very long one in pieces."""
    rest = b""
    while data := await stream.read(LINE_BYTES):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").removesuffix("\r")
        if len(rest) >= LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
