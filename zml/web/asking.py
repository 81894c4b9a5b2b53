"""What a request says, checked against the table of routes before any handler sees it. Raises Problem, and decides
nothing."""

from __future__ import annotations

import difflib
import typing
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from ..cluster.jobs import Problem, plain
from ..errors import BAD_JOB, NO_JOB
from .routes import Route

T = TypeVar("T")
Asked = dict[str, Any]  # what path, query and headers say, by name, in the types of the table
JSON = "application/json"
SHOWN = 100  # characters of what is refused


def asked(request: web.Request, route: Route) -> Asked:
    """What path, query and headers say. A name that the route does not know is refused: it would be ignored."""
    found: Asked = {}
    for name, kind in route.path_types.items():
        code = NO_JOB if name == "job" else ""
        found[name] = checked(request.match_info[name], kind, name, status=404, code=code)
    for name, header in route.headers.items():
        if name in request.headers:
            found[name] = checked(request.headers[name], header.type, name)
    for name in set(request.query):
        if name not in route.query:
            near = difflib.get_close_matches(name, list(route.query), n=1, cutoff=0.5)
            known = f"It may have {', '.join(route.query)}." if route.query else "There is no query here."
            fix = f"Did you mean {near[0]}?" if near else known
            raise Problem(400, f"the query has an unknown name {name[:SHOWN]}", fix)
        values: Any = request.query.getall(name)
        kind = route.query[name].type
        if typing.get_origin(kind) is list:
            (each,) = typing.get_args(kind)
            found[name] = [checked(value, each, name) for value in values]
            continue
        if len(values) > 1:
            raise Problem(400, f"{name} is there {len(values)} times", "Give it once.")
        found[name] = checked("true" if kind is bool and not values[0] else values[0], kind, name)
    return found


def checked(value: Any, kind: Any, name: str, *, status: int = 400, code: str = "") -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise Problem(status, f"{name} = {str(value)[:SHOWN]!r}: {said(error)}", code=code) from None


async def body(request: web.Request, kind: type[T], *, empty: T | None = None) -> T:
    """The JSON of a request as a struct; `empty` where there is none."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise Problem(415, "the body is compressed", "Send it as it is.")
    raw = await request.read()
    if not raw and empty is not None:
        return empty
    if request.content_type != JSON:  # which a web page cannot send across origins without being asked
        raise Problem(
            415, f"the body is {request.content_type[:SHOWN]}", f"Send it with Content-Type: {JSON}."
        )
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise Problem(422, said(error), "openapi.json says what may be there.", BAD_JOB) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON that can be read: {error}", code=BAD_JOB) from None


def said(error: Exception) -> str:
    """What msgspec says, as the end of a sentence."""
    return plain(error).replace(" - at $.", " at ")
