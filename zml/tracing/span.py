"""What a span is, and how one is named to another process: W3C Trace Context, as a field of a message's header.

    00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01       trace, span, and 01 where the step is sampled

Behind it, in the same field, may stand such contexts of earlier steps that turned out slow: "keep these, too". Rule:
what cannot be read is no context, and never an error: no gradient is refused for the sake of its trace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

MOST_KEPT = 4  # earlier steps in one header, which has 4 KB for everything
LENGTH = 55
PARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)
Value: TypeAlias = str | int | float | bool


class Context(NamedTuple):
    """Which span of which trace. Neither number is 0."""

    trace_id: int  # 128 bits
    span_id: int  # 64 bits
    sampled: bool


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took a while. Seconds are those of this process' steady clock (`time.perf_counter`)."""

    name: str
    context: Context
    parent_id: int | None  # in the same trace; None: nobody's
    began: float
    ended: float
    kind: Literal["internal", "client", "server"] = "internal"  # client: another process is asked
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str = ""
    links: tuple[Context, ...] = ()  # what else it followed from


def traceparent(context: Context) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.sampled):02x}"


def parse(text: str) -> Context | None:
    """Bit 0 of the flags is `sampled`; the others are for others."""
    found = PARENT.fullmatch(text)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return Context(trace_id, span_id, bool(flags & 1)) if trace_id and span_id else None


def write_header(own: Context, kept: Sequence[Context] = ()) -> str:
    """The field of a message that belongs to the span `own`."""
    assert len(kept) <= MOST_KEPT, "the rest goes with the next message"
    return " ".join(map(traceparent, (own, *kept)))


def read_header(text: str) -> tuple[Context | None, list[Context]]:
    """The message's own context, and those of earlier steps that are to be kept."""
    if not text or len(text) > (LENGTH + 1) * (MOST_KEPT + 1):
        return None, []
    own, *kept = (parse(part) for part in text.split(" "))
    return own, [context for context in kept if context is not None]
