"""Traces of what belongs to no step: a checkpoint, a recovery. Few, and each is kept."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from random import Random

from . import emit, on
from .span import Context, Span, Value, parse, traceparent

_random = Random()  # seeded by the system


class Tree:
    """A span and those below it, which are let out together when it ends."""

    def __init__(self, name: str, **attributes: Value) -> None:
        self.name = name
        self.attributes = attributes
        self.began = time.perf_counter()
        self.own = self.open = Context(_random.getrandbits(128) or 1, draw(), True)  # `open`: the innermost
        self.spans: list[Span] = []

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """What goes on now is a span below."""
        outer, began, error = self.open, time.perf_counter(), ""
        self.open = inner = Context(self.own.trace_id, draw(), True)
        try:
            yield
        except BaseException as failed:
            error = type(failed).__name__
            raise
        finally:
            self.open = outer
            self.spans.append(Span(name, inner, outer.span_id, began, time.perf_counter(), error=error))

    def header(self) -> str:
        """For a message to another process that does its part; empty while tracing is off."""
        return traceparent(self.open) if on() else ""

    def end(self, error: str = "", **attributes: Value) -> None:
        told = named({**self.attributes, **attributes})
        whole = Span(self.name, self.own, None, self.began, time.perf_counter(), attributes=told, error=error)
        emit([whole, *self.spans])


@contextmanager
def part(header: str, name: str, **attributes: Value) -> Iterator[None]:
    """This process' part of what another one has begun, if that said so."""
    above, began, error = parse(header), time.perf_counter(), ""
    try:
        yield
    except BaseException as failed:
        error = type(failed).__name__
        raise
    finally:
        if above is not None:
            own = Context(above.trace_id, draw(), True)
            told, now = named(attributes), time.perf_counter()
            emit([Span(name, own, above.span_id, began, now, "server", told, error)])


def single(name: str, began: float, **attributes: Value) -> None:
    """Something that is over."""
    if on():
        own = Context(_random.getrandbits(128) or 1, draw(), True)
        emit([Span(name, own, None, began, time.perf_counter(), attributes=named(attributes))])


class Recoveries:
    """Shards that were away: how long, until they served again."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.since: dict[str, float] = {}

    def look(self, away: Collection[str] | None) -> None:
        """Those that are away now. None: the job does not run, and nobody is waited for."""
        if away is None:
            self.since.clear()
            return
        for shard in away:
            self.since.setdefault(shard, time.perf_counter())
        for shard in [known for known in self.since if known not in away]:
            single("zml.recover", self.since.pop(shard), job=self.job, shard=shard)


def draw() -> int:
    return _random.getrandbits(64) or 1


def named(attributes: dict[str, Value]) -> dict[str, Value]:
    return {f"zml.{name}": value for name, value in attributes.items()}
