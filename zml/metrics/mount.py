"""What every role answers over HTTP:

    /metrics    for Prometheus, as the catalog declares it
    /livez      does the loop of this process turn?        /healthz is the same
    /readyz     can this process do its part? 503 and why, where it cannot
    /api/sd     who else can be scraped, for http_sd (https://prometheus.io/docs/prometheus/latest/http_sd/)

Only this module knows aiohttp here. Rule: nothing of it asks a peer; `/livez` asks nobody at all.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from .. import __version__
from ..web.server import OPEN, Mount
from .exposition import text
from .points import Source

LARGE = 200  # points: to write so many down takes some 4 ms, and a loop should not wait for more


Handler = Callable[[web.Request], Awaitable[web.Response]]


def mounted(source: Source) -> Mount:
    def mount(app: web.Application) -> None:
        routes: dict[str, Handler] = {"/livez": livez, "/healthz": livez, "/readyz": readyz(source)}
        app[OPEN].update(routes)
        routes["/metrics"] = metrics(source)
        if source.targets() is not None:
            routes["/api/sd"] = discovery(source)
        for path, handler in routes.items():
            app.router.add_get(path, handler)

    return mount


async def livez(request: web.Request) -> web.Response:
    return json({"alive": True, "zml": __version__, "pid": os.getpid()})


def readyz(source: Source) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        checks = source.checks()
        reasons = [because for because in checks.values() if because]
        told: dict[str, object] = {"ready": not reasons}
        if reasons:
            told["reasons"] = reasons
        if "verbose" in request.query:
            told["checks"] = {what: because or "ok" for what, because in checks.items()}
        return json(told, status=503 if reasons else 200)

    return answer


def metrics(source: Source) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        points = await source.points()
        accept = ",".join(request.headers.getall("Accept", []))
        if len(points) > LARGE:
            body, kind = await asyncio.to_thread(text, source.role, points, accept)
        else:
            body, kind = text(source.role, points, accept)
        response = web.Response(body=body, headers={"Content-Type": kind})
        response.enable_compression()  # as Prometheus asks for
        return response

    return answer


def discovery(source: Source) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return json(source.targets() or [])

    return answer


def json(told: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(told), content_type="application/json")
