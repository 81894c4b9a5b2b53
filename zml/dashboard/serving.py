"""The dashboard over HTTP: pages as they lie in `static/`, views as JSON, and what changes as server-sent events.

`mount` adds it to any aiohttp application: `zml dashboard` makes its own, a coordinator and a hub have one anyway. What
is in a run is for whoever may come in (`zml.web.access`); the pages themselves tell nothing, and need no token: they
ask for it, and send it as a header with each request, so that no other page can make a browser send it. Nothing is
written and nothing can be ordered here.

Everything is bounded: views by themselves (`views`), threads, time, streams, and how long a reader may be slow.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, TypeVar

import msgspec
import structlog
from aiohttp import web

from ..cluster.jobs import Problem
from ..logs.reading import LEVELS, BadCursor, Wanted
from ..web.access import Door
from ..web.server import OPEN, refusal
from .run import Run
from .sources import Source

log = structlog.get_logger()
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CSP = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
SQUEEZE = 2048  # bytes; a larger answer is compressed


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    streams: int = 64
    threads: int = 4
    deadline_s: float = 30.0
    stall_s: float = 30.0  # that a reader of a stream may take nothing
    every_s: float = 1.0  # between two looks for a stream
    still_s: float = 15.0  # without news a stream says that it is there
    body_bytes: int = 2**20


class LogsAsked(msgspec.Struct, frozen=True, kw_only=True):
    """Which lines of the log; the body of a POST, for a cursor may be long."""

    members: Annotated[list[Annotated[str, msgspec.Meta(max_length=100)]], msgspec.Meta(max_length=600)] = []
    level: Annotated[str, msgspec.Meta(max_length=20)] = ""
    text: Annotated[str, msgspec.Meta(max_length=200)] = ""
    most: Annotated[int, msgspec.Meta(ge=1, le=2000)] = 500
    cursor: Annotated[str, msgspec.Meta(max_length=2**19)] = ""
    until: float | None = None

    def wanted(self) -> Wanted:
        """Raises Problem."""
        if self.level and self.level not in LEVELS:
            raise Problem(400, f"there is no level {self.level!r}", f"Choose one of {', '.join(LEVELS)}.")
        return Wanted(
            members=frozenset(self.members), level=self.level or LEVELS[0], text=self.text, until=self.until
        )


@dataclass(frozen=True, slots=True)
class Asset:
    body: bytes
    type: str
    tag: str


def assets() -> dict[str, Asset]:
    """Everything below `static/`, by its path there."""
    found: dict[str, Asset] = {}
    root = resources.files(__package__) / "static"
    waiting = [("", root)]
    while waiting:
        prefix, folder = waiting.pop()
        for each in folder.iterdir():
            if each.is_dir():
                waiting.append((f"{prefix}{each.name}/", each))
            elif (kind := TYPES.get(each.name.rpartition(".")[2])) is not None:
                body = each.read_bytes()
                tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
                found[prefix + each.name] = Asset(body, kind, tag)
    return found


def mount(
    app: web.Application,
    source: Source,
    prefix: str = "",
    *,
    door: Door | None = None,
    limits: Limits | None = None,
) -> frozenset[str]:
    """Add the dashboard to an application, below `prefix`. Returns the paths that need no token, as aiohttp calls them
    (`resource.canonical`), and adds them to `app[OPEN]` where there is one. `door`: who may come in, where nobody else
    asks them."""
    return Pages(source, door, limits or Limits()).add(app, prefix)


class Pages:
    def __init__(self, source: Source, door: Door | None, limits: Limits) -> None:
        self.source = source
        self.door = door
        self.limits = limits
        self.assets = assets()
        self.threads = ThreadPoolExecutor(limits.threads, "zml-dashboard")
        self.streams = 0

    def add(self, app: web.Application, prefix: str) -> frozenset[str]:
        def route(path: str, handler: Handler, *, anybody: bool = False, patient: bool = False) -> str:
            method = "POST" if path.startswith("POST ") else "GET"
            path = prefix + path.removeprefix("POST ")
            added = app.router.add_route(method, path, self._told(handler, anybody, patient))
            assert added.resource is not None
            return added.resource.canonical

        open_ = {
            route("/", self.index, anybody=True),
            route("/static/{file:[A-Za-z0-9_./-]+}", self.static, anybody=True),
        }
        route("/view/about", self.about)
        route("/view/runs", self.runs)
        route("/view/jobs", self.jobs)
        route("/view/jobs/{job}", self.why)
        route("/view/run/{run}/live", self.live, patient=True)
        route("/view/run/{run}/logs", self.logs)
        route("POST /view/run/{run}/logs", self.logs)
        route("/view/run/{run}/{page}", self.page)
        if prefix:
            open_.add(route("", self.slash, anybody=True))

        async def stop(_: web.Application) -> None:
            self.threads.shutdown(wait=False, cancel_futures=True)

        app.on_cleanup.append(stop)
        if OPEN in app:
            app[OPEN].update(open_)
        return frozenset(open_)

    def _told(self, handler: Handler, anybody: bool, patient: bool) -> Handler:
        """What every handler does: let in, keep the deadline, tell what went wrong, add the headers."""

        async def told(request: web.Request) -> web.StreamResponse:
            try:
                if self.door is not None:
                    self.door.admit(request.headers, anybody=anybody)
                async with asyncio.timeout(None if patient else self.limits.deadline_s):
                    response = await handler(request)
            except Problem as problem:
                response = refusal(problem)
            except TimeoutError:
                response = refusal(Problem(504, "reading the run took too long", "Ask again."))
            except web.HTTPException:
                raise
            except (ConnectionError, asyncio.CancelledError):
                raise  # nobody is there any more
            except Exception:
                log.exception("a page of the dashboard failed", path=request.path[:200])
                response = refusal(Problem(500, "the dashboard has failed; its log says how"))
            if not response.prepared:
                response.headers.update(HEADERS)
                response.headers.setdefault("Cache-Control", "no-store")
            return response

        return told

    async def _in_thread(self, read: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, read)

    # -- the pages -------------------------------------------------------------------------------------------

    async def index(self, request: web.Request) -> web.StreamResponse:
        return self._asset(request, "index.html")

    async def static(self, request: web.Request) -> web.StreamResponse:
        return self._asset(request, request.match_info["file"])

    async def slash(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPPermanentRedirect(request.path + "/")

    def _asset(self, request: web.Request, name: str) -> web.Response:
        asset = self.assets.get(name)
        if asset is None:
            raise Problem(404, "there is no such page")
        headers = {"ETag": asset.tag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == asset.tag:
            return web.Response(status=304, headers=headers)
        response = web.Response(body=asset.body, content_type=asset.type, charset="utf-8", headers=headers)
        if len(asset.body) > SQUEEZE:
            response.enable_compression()
        return response

    # -- views -----------------------------------------------------------------------------------------------

    async def about(self, request: web.Request) -> web.Response:
        return answer(self.source.about())

    async def runs(self, request: web.Request) -> web.Response:
        return answer(await self._in_thread(self.source.runs))

    async def jobs(self, request: web.Request) -> web.Response:
        found = self.source.jobs()
        if found is None:
            raise Problem(
                404, "there is no hub here", "Jobs are at a coordinator that was started with --cluster."
            )
        return answer(found)

    async def why(self, request: web.Request) -> web.Response:
        found = self.source.why(request.match_info["job"])
        if found is None:
            raise Problem(404, "there is no such job")
        return answer(found)

    async def _run(self, request: web.Request) -> Run:
        name = request.match_info["run"]
        run = self.source.run(name)
        if run is None:
            await self._in_thread(lambda: self.source.seek(name))
            run = self.source.run(name)
        if run is None:
            raise Problem(
                404, "there is no such run, or it has not begun", "The first page lists what there is."
            )
        run.ask()
        return run

    async def page(self, request: web.Request) -> web.Response:
        run, query = await self._run(request), request.query
        readers: dict[str, Callable[[], Any]] = {
            "overview": run.overview,
            "series": run.series,
            "workers": lambda: run.workers(whole=query.get("window") == "all"),
            "shards": run.shards,
            "data": run.data,
            "checkpoints": run.checkpoints,
            "events": run.events,
            "config": run.config,
            "steps": lambda: run.waterfall(clock),
        }
        page, clock = request.match_info["page"], whole_number(query.get("clock"))
        if page not in readers:
            raise Problem(404, "there is no such page", f"There is {', '.join(readers)}.")
        return answer(await self._in_thread(readers[page]))

    async def logs(self, request: web.Request) -> web.Response:
        run = await self._run(request)
        asked = await logs_asked(request, self.limits.body_bytes)
        wanted = asked.wanted()
        try:
            return answer(await self._in_thread(lambda: run.logs(wanted, asked.most, asked.cursor)))
        except BadCursor as error:
            raise Problem(400, str(error), "Begin again without a cursor.") from None

    # -- what changes ----------------------------------------------------------------------------------------

    async def live(self, request: web.Request) -> web.StreamResponse:
        """The overview once, then those of its fields that have changed; until the run is over, or nobody listens."""
        run = await self._run(request)
        if self.streams >= self.limits.streams:
            raise Problem(
                503, "there are as many live pages as the server takes", "The page asks again by itself."
            )
        self.streams += 1
        try:
            response = web.StreamResponse(headers={**HEADERS, "Cache-Control": "no-store"})
            response.content_type, response.charset = "text/event-stream", "utf-8"
            await response.prepare(request)
            await self._tell(run, response)
            return response
        finally:
            self.streams -= 1

    async def _tell(self, run: Run, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        sent: dict[str, bytes] = {}
        last = loop.time()
        while True:
            run.ask()
            view = await self._in_thread(run.overview)
            now = {field: msgspec.json.encode(getattr(view, field)) for field in view.__struct_fields__}
            changed = [field for field, value in now.items() if sent.get(field) != value]
            if changed:
                body = b",".join(b'"%b":%b' % (field.encode(), now[field]) for field in changed)
                await self._write(response, b"event: overview\ndata: {%b}\n\n" % body)
                sent, last = now, loop.time()
            elif loop.time() - last > self.limits.still_s:
                await self._write(response, b": nothing new\n\n")
                last = loop.time()
            if view.head.over:
                await self._write(response, b"event: over\ndata: {}\n\n")
                return
            await asyncio.sleep(self.limits.every_s)

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.limits.stall_s):
                await response.write(data)
        except TimeoutError:
            raise ConnectionResetError("the reader takes nothing") from None


async def logs_asked(request: web.Request, most_bytes: int) -> LogsAsked:
    """Out of a query or a body. Raises Problem."""
    try:
        if request.method == "GET":
            plain = {key: value for key, value in request.query.items() if key in ("level", "text", "cursor")}
            many = {"members": request.query.getall("member", [])}
            numbers = {key: float(request.query[key]) for key in ("until",) if key in request.query} | {
                key: int(request.query[key]) for key in ("most",) if key in request.query
            }
            return msgspec.convert({**plain, **many, **numbers}, LogsAsked)
        if (request.content_length or 0) > most_bytes:
            raise Problem(413, "the body is too large")
        return msgspec.json.decode(await request.read(), type=LogsAsked)
    except (msgspec.MsgspecError, ValueError) as error:
        raise Problem(400, f"this asks for no lines of a log: {str(error)[:200]}") from None


def whole_number(text: str | None) -> int | None:
    """Raises Problem."""
    if text is None or text == "":
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise Problem(400, "a step is a number from 0 on")
    return int(text)


def answer(view: Any) -> web.Response:
    body = msgspec.json.encode(view)
    response = web.Response(body=body, content_type="application/json")
    if len(body) > SQUEEZE:
        response.enable_compression()
    return response
