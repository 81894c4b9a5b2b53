"""The description of the API, OpenAPI 3.1: made from the table of routes and the structs themselves, never by hand."""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

from .. import __version__
from .bodies import PREFIX, ProblemDetails
from .routes import ROUTES, Query, Route

ALWAYS = (400, 401, 403, 421, 503)  # how every route may refuse
REFERENCE = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    kinds: list[Any] = [ProblemDetails]
    for route in ROUTES:
        queries = (*route.query.values(), *route.headers.values())
        kinds += [*route.path_types.values(), *(each.type for each in queries)]
        kinds += [each for each in (route.body, *route.answers.values()) if each not in (None, bytes, str)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REFERENCE)
    schema = [(kind, found) for kind, found in zip(kinds, schemas, strict=True)]

    def of(kind: Any) -> Any:
        return next(found for each, found in schema if each is kind or each == kind)

    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = operation(route, of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "zml",
            "version": __version__,
            "description": "Jobs and nodes of one standing coordinator. Times are seconds; moments, since 1970.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],  # on loopback none is needed
    }


@cache
def encoded() -> bytes:
    return msgspec.json.format(msgspec.json.encode(document()))


def operation(route: Route, of: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"operationId": route.name, "summary": route.about}
    said["parameters"] = [
        *(parameter(name, "path", Query(kind, ""), of) for name, kind in route.path_types.items()),
        *(parameter(name, "query", each, of) for name, each in route.query.items()),
        *(parameter(name, "header", each, of) for name, each in route.headers.items()),
    ]
    if route.body is bytes:
        said["requestBody"] = {
            "required": True,
            "content": {"application/gzip": {"schema": {"type": "string", "format": "binary"}}},
        }
    elif route.body is not None:
        said["requestBody"] = {
            "required": not route.optional_body,
            "content": {"application/json": {"schema": of(route.body)}},
        }
    said["responses"] = {
        str(status): response(route, status, kind, of) for status, kind in route.answers.items()
    }
    told = {
        "description": "",
        "content": {"application/problem+json": {"schema": of(ProblemDetails)}},
    }
    for status in sorted({*ALWAYS, *route.refusals, *(() if route.patient else (408, 504))}):
        said["responses"][str(status)] = {**told, "description": HTTPStatus(status).phrase}
    if route.anybody:
        said["security"] = []
    return said


def parameter(name: str, place: str, each: Query, of: Any) -> dict[str, Any]:
    said = {"name": name, "in": place, "required": place == "path", "schema": of(each.type)}
    return {**said, "description": each.about} if each.about else said


def response(route: Route, status: int, kind: Any, of: Any) -> dict[str, Any]:
    said: dict[str, Any] = {"description": HTTPStatus(status).phrase}
    if kind is str:
        said["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif kind is bytes:
        said["content"] = {"application/gzip": {"schema": {"type": "string", "format": "binary"}}}
    elif kind is not None:
        said["content"] = {"application/json": {"schema": of(kind)}}
    if route.answer_headers:
        said["headers"] = {
            name: {"description": about, "schema": {"type": "string"}}
            for name, about in route.answer_headers.items()
        }
    return said
