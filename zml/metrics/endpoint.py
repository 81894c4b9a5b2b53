"""Where a role answers HTTP: bound before it does anything else, so that its address can travel when it joins, and
served from the first connection on.

What serves it (aiohttp, prometheus-client) is loaded when somebody calls, in a thread: where nobody does, a process
starts and comes back as fast as without. Rule: that it cannot be bound, or cannot be served, is said, and stops nobody;
but a port that somebody names for a job that is yet to begin has to be free, for there they will look.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import structlog

from ..address import host_and_port, is_anywhere, is_loopback, url
from ..errors import PORT_IN_USE, ZmlError
from .lag import Lag

if TYPE_CHECKING:
    from ..config import Settings
    from ..web.access import Token
    from ..web.server import Mount, Server
    from .points import Source

OFF = "off"
BACKLOG = 128
SERVES = ("zml.metrics.mount", "zml.web.server", "zml.dashboard.serving")

log = structlog.get_logger()


class Endpoint:
    """One process's, from `opened` to `close`. `url` is where others reach it; empty where there is none."""

    def __init__(
        self, listener: socket.socket | None, host: str, here: str, tokens: tuple[Token, ...]
    ) -> None:
        self.listener = listener
        self.host = host
        self.url = here
        self.tokens = tokens
        self.lag = Lag()
        self.source: Source | None = None
        self.mounts: Sequence[Mount] = ()
        self.server: Server | None = None
        self.serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return 0 if self.listener is None else int(self.listener.getsockname()[1])

    def serve(self, source: Source, mounts: Sequence[Mount] = ()) -> None:
        """From now on. `mounts` add to what is answered; they are called when somebody has called first."""
        if self.listener is None:
            return
        self.source, self.mounts = source, mounts
        self.lag.start()
        asyncio.get_running_loop().add_reader(self.listener, self._called)

    async def close(self) -> None:
        """Twice is the same as once."""
        self.lag.stop()
        listener, self.listener = self.listener, None
        if listener is None:
            return
        if self.serving is None:
            asyncio.get_running_loop().remove_reader(listener)
        else:
            self.serving.cancel()
            await asyncio.wait({self.serving})
        if self.server is not None:
            await self.server.stop()
        listener.close()

    def _called(self) -> None:
        """The first connection waits in the queue of the socket, and others behind it."""
        assert self.listener is not None
        asyncio.get_running_loop().remove_reader(self.listener)
        self.serving = asyncio.ensure_future(self._serve(self.listener))

    async def _serve(self, listener: socket.socket) -> None:
        try:
            for name in SERVES:
                await asyncio.to_thread(import_module, name)
            from ..web.access import Door
            from ..web.server import Limits, Server
            from .mount import mounted

            assert self.source is not None, "`serve` comes first"
            mounts = [mounted(self.source), *self.mounts]
            server = Server(None, Door(self.host, self.tokens), Limits(), mounts)
            await server.start_on(listener)
            self.server = server
        except asyncio.CancelledError:
            raise
        except Exception:  # whatever it is: training goes on
            log.exception("no HTTP is answered", url=self.url)
            listener.close()


def opened(
    settings: Settings, *, preferred: int = 0, reached_from: Sequence[str] = (), must: bool = False
) -> Endpoint:
    """Bind where the settings say: of port 0, `preferred` first. `reached_from`: addresses of peers, or our own, that
    tell by which name others reach this machine, where it listens on all of its addresses.

    Raises ZmlError for what is no address and, with `must`, for tokens that cannot be read or are missing, and for a
    port that was named and is taken; whatever else fails is logged. A member never needs HTTP: on its machine the file
    of tokens may not be there at all.
    """
    if settings.http == OFF:
        return Endpoint(None, "", "", ())
    host, port = host_and_port(settings.http)
    try:
        tokens = guarded(settings)
    except ZmlError as error:
        if must:
            raise
        log.warning("no HTTP is answered", at=settings.http, because=error.what, fix=error.fix)
        return Endpoint(None, "", "", ())
    listener = None
    for wanted in [port] if port else [preferred, 0] if preferred else [0]:
        try:
            listener = bound(host, wanted)
            break
        except OSError as error:
            failed = error
    if listener is None:
        if must and port:
            raise _taken(settings.http, failed)
        log.warning("no HTTP is answered", at=settings.http, because=failed.strerror or str(failed))
        return Endpoint(None, "", "", ())
    here = reached_at(url(host, listener.getsockname()[1]), reached_from)
    return Endpoint(listener, host, here, tokens)


def must_be_free(settings: Settings) -> None:
    """Raises ZmlError where the settings name a port, and it cannot be had."""
    host, port = ("", 0) if settings.http == OFF else host_and_port(settings.http)
    if port:
        try:
            bound(host, port).close()
        except OSError as error:
            raise _taken(settings.http, error) from None


def _taken(at: str, error: OSError) -> ZmlError:
    because = "in use" if error.errno == errno.EADDRINUSE else f"not to be had: {error.strerror or error}"
    fix = "Choose another port with --http; with port 0 zml takes one that is free."
    return ZmlError(PORT_IN_USE, f"the HTTP address {at} is {because}", fix)


def guarded(settings: Settings) -> tuple[Token, ...]:
    """The tokens of the file in the settings, which is a must beyond loopback. Raises ZmlError."""
    host = "localhost" if settings.http == OFF else host_and_port(settings.http)[0]
    if not settings.http_tokens and is_loopback(host):
        return ()
    from ..web.access import Door, read_tokens

    found = read_tokens(settings.http_tokens) if settings.http_tokens else ()
    Door(host, found)
    return found


def bound(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(
        None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def reached_at(here: str, addresses: Sequence[str]) -> str:
    """Where others reach what listens here; `addresses` are known to be reached from here."""
    host, port = host_and_port(here)
    return url(own_name(addresses), port) if is_anywhere(host) else here


def http_hosts(settings: Settings) -> list[str]:
    """By which names what this machine's node starts says that it answers HTTP."""
    if settings.http == OFF:
        return []
    host, _ = host_and_port(settings.http)
    if not is_anywhere(host):
        return [host]
    return list(dict.fromkeys([*(own_name([each]) for each in settings.coordinator), socket.gethostname()]))


def own_name(addresses: Sequence[str]) -> str:
    """By which of its addresses others reach this machine: that by which it reaches one of these."""
    from ..slurm.address import towards

    for address in addresses:
        host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        if address.startswith("tcp://") and not is_loopback(host) and not is_anywhere(host):
            try:
                return towards(host)
            except ZmlError:
                continue
    return socket.gethostname()
