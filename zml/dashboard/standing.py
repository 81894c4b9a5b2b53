"""`zml dashboard` as a process: a server of its own, from the command to Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from ..errors import PORT_IN_USE, ZmlError
from ..web.access import Door
from .serving import Limits, mount
from .sources import Source

STOP_S = 0.5


def look(source: Source, door: Door, host: str, port: int, asked: bool, say: Callable[[str], None]) -> int:
    """Serve until a signal. `asked`: this port and no other. `say` is told the URL. Raises ZmlError."""
    return asyncio.run(_look(source, door, host, port, asked, say))


async def _look(
    source: Source, door: Door, host: str, port: int, asked: bool, say: Callable[[str], None]
) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with serving(source, door, host, port, asked) as url:
        say(url)
        await stopping.wait()
    return 0


@contextlib.asynccontextmanager
async def serving(
    source: Source, door: Door, host: str, port: int, asked: bool = True, limits: Limits | None = None
) -> AsyncIterator[str]:
    """A server of its own; yields its URL. Raises ZmlError where it cannot listen."""
    limits = limits or Limits()
    app = web.Application(client_max_size=limits.body_bytes)
    mount(app, source, door=door, limits=limits)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_S)
    await runner.setup()
    try:
        address = await listen(runner, host, port, asked)
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        yield f"http://{shown}:{address[1]}/"
    finally:
        await runner.cleanup()


async def listen(runner: web.AppRunner, host: str, port: int, asked: bool) -> tuple[str, int]:
    """On this port; where it is taken and nobody asked for it, on another."""
    for wanted in (port,) if asked else (port, 0):
        site = web.TCPSite(runner, host, wanted, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE and wanted and not asked:
                continue
            because = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened on: {error}"
            raise ZmlError(PORT_IN_USE, f"{host}:{wanted} {because}", "Choose another --port.") from None
        where = runner.addresses[0]
        return str(where[0]), int(where[1])
    raise AssertionError("unreachable")
