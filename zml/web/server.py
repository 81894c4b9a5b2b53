"""The HTTP server: runs inside the loop of a role, beside its sockets, and takes little of it.

What it answers is mounted: the API of the standing coordinator (`routes`), metrics and health (`zml.metrics.mount`),
the dashboard.

Everything is bounded: connections, the size of a body and of an archive, how long a request may take, how long a
connection may say nothing, how long a reader may be slow. What a handler raises becomes application/problem+json
(RFC 9457); an error of ours is logged and told as such, without its text. A request that has no answer yet when the
server stops gets none: clients ask again.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import msgspec
import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from ..address import host_and_port
from ..address import url as url_of
from ..cluster.jobs import Desk, Problem
from ..errors import BOOK, PORT_IN_USE, UNREACHABLE, ZmlError
from .access import Door, read_tokens
from .asking import Asked, asked
from .bodies import PORT, PREFIX, ProblemDetails
from .handlers import PLAIN, VISITOR, Handlers
from .routes import ROUTES, Route

log = structlog.get_logger()

OPEN = web.AppKey("open", set[str])  # paths that tell no secret, and need no token
DEFAULT_BIND = f"127.0.0.1:{PORT}"
BACKLOG = 128
STOP_S = 5.0
NEVER = float("inf")
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much anybody may ask of the server."""

    connections: int = 512
    body_bytes: int = 2**20
    archive_bytes: int = 512 * 2**20
    uploads: int = 4  # at once
    deadline_s: float = 30.0  # of a request that neither waits nor streams
    upload_s: float = 900.0
    follow_s: float = 3600.0  # of a log; then the client asks again, from where it was
    stall_s: float = 60.0  # that the other side may neither send nor take a piece
    idle_s: float = 90.0  # of a connection between requests, and before the first
    poll_s: float = 0.2  # between two looks at a file that is followed


Mount = Callable[[web.Application], None]  # adds what it answers to; what is to be open, to app[OPEN]


class Server:
    """Listens from `serve`, or `start`, to `stop`. Without a desk it has no API."""

    def __init__(
        self,
        desk: Desk | None,
        door: Door,
        limits: Limits,
        mounts: Sequence[Mount] = (),
        pool: Callable[[], str] = str,
    ) -> None:
        self.desk = desk
        self.door = door
        self.limits = limits
        self.threads = ThreadPoolExecutor(4, "zml-files")  # a hanging file system holds up no more than these
        self.waiting: set[asyncio.Task[object]] = set()  # of patient routes: these are cancelled at a stop
        self.quiet_since: dict[RequestHandler, float] = {}  # connections that are in no request
        self.url = ""
        app = web.Application(client_max_size=limits.body_bytes, middlewares=[self._tell, self._admit])
        app[OPEN] = set()
        if desk is not None:
            self._mount_api(app, Handlers(desk, limits, self.threads, pool))
        for mount in mounts:
            mount(app)
        self.runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=1.0
        )
        self.listener: asyncio.Server | None = None
        self.sweeper: asyncio.Task[None] | None = None

    def _mount_api(self, app: web.Application, handlers: Handlers) -> None:
        for route in ROUTES:
            path = PREFIX + route.path
            app.router.add_route(route.method, path, self._bounded(route, getattr(handlers, route.name)))
            if route.anybody:
                app[OPEN].add(path)

    # -- its life ------------------------------------------------------------------------------------------

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Raises ZmlError."""
        await self._start(tls, host=host, port=port, reuse_address=True)

    async def start_on(self, listener: socket.socket) -> None:
        """On a socket that is bound already."""
        await self._start(None, sock=listener)

    async def _start(self, tls: ssl.SSLContext | None, **where: Any) -> None:
        await self.runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self.listener = await loop.create_server(self._connection, ssl=tls, backlog=BACKLOG, **where)
        except OSError as error:
            await self.runner.cleanup()
            self.threads.shutdown(wait=False)
            because = (
                "is in use"
                if error.errno == errno.EADDRINUSE
                else f"cannot be listened on: {error.strerror or error}"
            )
            what = f"{where.get('host', 'the socket')}:{where.get('port', '')} {because}"
            raise ZmlError(PORT_IN_USE, what, "Choose another port for the API, or port 0.") from None
        address = self.listener.sockets[0].getsockname()
        here = url_of(*address[:2])
        self.url = here.replace("http:", "https:") if tls else here
        self.sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stop listening, let quick requests end, break off those that wait. May be called twice."""
        if self.listener is None:
            return
        listener, self.listener = self.listener, None
        listener.close()
        if self.sweeper is not None:
            self.sweeper.cancel()
        for task in self.waiting:
            task.cancel()
        try:
            async with asyncio.timeout(STOP_S):
                await self.runner.cleanup()
        except TimeoutError:
            log.warning("connections of the API did not end in time")
        self.threads.shutdown(wait=False)

    # -- connections ---------------------------------------------------------------------------------------

    def _connection(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection: one that says no where there are too many. In a rush, as many more as
        the backlog holds may come in before the first of them counts."""
        assert self.runner.server is not None
        if len(self.runner.server.connections) >= self.limits.connections:
            return Full()
        return self.runner.server()

    async def _sweep(self) -> None:
        """Close connections that are open and say nothing: also those that never finish the head of a request."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle_s / 4))
            assert self.runner.server is not None
            now = loop.time()
            self.quiet_since = {
                each: self.quiet_since.get(each, now) for each in self.runner.server.connections
            }
            for protocol, since in self.quiet_since.items():
                if since < now - self.limits.idle_s:
                    protocol.force_close()

    # -- around every handler ------------------------------------------------------------------------------

    @web.middleware
    async def _tell(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """What is raised, told; and the headers of every answer."""
        self.quiet_since[request.protocol] = NEVER
        try:
            response = await handler(request)
        except Problem as problem:
            response = refusal(problem)
        except ZmlError as error:
            response = refusal(Problem(422, error.what, error.fix, error.code))
        except web.HTTPException as error:
            response = refusal(in_words(request, error))
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except (ConnectionError, asyncio.CancelledError):
            raise  # nobody is there any more
        except Exception:
            log.exception("a request failed", method=request.method, path=request.path)
            response = refusal(Problem(500, "the server has failed; its log says how"))
        finally:
            self.quiet_since[request.protocol] = asyncio.get_running_loop().time()
        if not response.prepared:
            response.headers.update(PLAIN)
        return response

    @web.middleware
    async def _admit(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        resource = (
            request.match_info.route.resource
        )  # where the request was led, whatever its path looks like
        anybody = resource is not None and resource.canonical in request.app[OPEN]
        request[VISITOR] = self.door.admit(request.headers, anybody=anybody)
        return await handler(request)

    def _bounded(
        self, route: Route, handler: Callable[[web.Request, Asked], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def quick(request: web.Request) -> web.StreamResponse:
            try:
                async with asyncio.timeout(self.limits.deadline_s):
                    return await handler(request, asked(request, route))
            except TimeoutError:
                raise Problem(
                    408 if not request.content.is_eof() else 504,
                    f"this took longer than {self.limits.deadline_s:g} s",
                    "Ask again; with the same Idempotency-Key nothing happens twice.",
                ) from None

        async def patient(request: web.Request) -> web.StreamResponse:
            task = asyncio.current_task()
            assert task is not None
            self.waiting.add(task)
            try:
                return await handler(request, asked(request, route))
            finally:
                self.waiting.discard(task)

        return patient if route.patient else quick


class Full(asyncio.Protocol):
    """Says that there are too many connections, and hangs up."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writer = cast(asyncio.Transport, transport)  # uvloop's is one without saying so
        body = encode_problem(Problem(503, "the server has as many connections as it takes", "Ask again."))
        writer.write(BUSY % (len(body), body))
        writer.close()


async def serve(
    desk: Desk | None,
    bind: str = DEFAULT_BIND,
    *,
    tokens: str | None = None,
    tls: ssl.SSLContext | None = None,
    limits: Limits | None = None,
    mounts: Sequence[Mount] = (),
    pool: Callable[[], str] = str,
) -> Server:
    """Answer for `desk`, and with the mounts, in the running loop until `stop`. `bind` is HOST:PORT; port 0 lets the
    system choose, and `url` of what is returned has it. `tokens` is a file (see `access.read_tokens`), and is a must
    beyond loopback. `pool` says how it is with nodes that come and go. Raises ZmlError."""
    host, port = host_and_port(bind)
    door = Door(host, read_tokens(tokens) if tokens else ())
    server = Server(desk, door, limits or Limits(), mounts, pool)
    await server.start(host, port, tls)
    return server


# -- refusals ------------------------------------------------------------------------------------------------


def encode_problem(problem: Problem) -> bytes:
    known = BOOK.get(problem.code)
    return msgspec.json.encode(
        ProblemDetails(
            status=problem.status,
            title=known.title if known else HTTPStatus(problem.status).phrase,
            detail=problem.what,
            type=f"{PREFIX}/errors/{problem.code}" if known else "about:blank",
            code=problem.code if known else "",
            fix=problem.fix,
        )
    )


def refusal(problem: Problem) -> web.Response:
    response = web.Response(
        status=problem.status, body=encode_problem(problem), content_type="application/problem+json"
    )
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="zml"'
    if problem.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def in_words(request: web.Request, error: web.HTTPException) -> Problem:
    """aiohttp's own refusals, in our words."""
    if error.status == 404:
        api = f"{PREFIX}/openapi.json" in request.app[OPEN]
        what = f"there is nothing at {request.path[:200]}"
        fix = f"{PREFIX}/openapi.json lists what there is." if api else "There are /metrics and /readyz."
        if not api and request.path.startswith(PREFIX):
            what = "this address is that of one run and its dashboard, not of a cluster of many jobs"
            fix = "Give a cluster's with --server, or start one: `zml coordinator --cluster FOLDER`."
            return Problem(error.status, what, fix, UNREACHABLE)
    elif error.status == 405:
        allowed = ", ".join(sorted(error.headers.get("Allow", "").split(",")))
        what, fix = f"{request.method[:20]} means nothing at {request.path[:200]}", f"Use {allowed}."
    elif error.status == 413:
        what, fix = "the body is larger than the server takes", "Send a folder as an archive."
    else:
        what, fix = error.reason or HTTPStatus(error.status).phrase, ""
    return Problem(error.status, what, fix)
