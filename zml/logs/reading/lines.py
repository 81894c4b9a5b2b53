"""One line of a log file: bytes in, a `Line` out. Whatever the bytes are, the result is harmless to print."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from ...text.ansi import harmless

LEVELS = ("debug", "info", "warning", "error", "critical")  # from harmless to bad
ALIASES = {"warn": "warning", "fatal": "critical", "exception": "error", "notset": "debug"}
JUNK_CHARS = 2000  # that are shown of a line which is no object
DEPTH = 6  # of fields; what lies deeper is shown as an ellipsis
NAME_CHARS = 64
BITS = 256  # of a number


class Line(msgspec.Struct, frozen=True):
    """What one process said. Texts hold no control characters but line feeds and tabs; see `zml.text.ansi`."""

    time: float  # seconds since the Unix epoch; of a line without one, that of its neighbour
    level: str  # one of LEVELS
    member: str  # "w3", "p0", "coordinator", ...
    role: str  # "worker" is the agent, "script" what runs in it; empty if it is not known
    message: str
    fields: Mapping[str, Any] = {}  # all else; values as JSON has them

    @property
    def step(self) -> int | None:
        step = self.fields.get("step")
        return step if type(step) is int else None


def parse(raw: bytes, member: str, neighbour: float) -> Line | None:
    """`member` is whose file it is, for a line that does not say; None for an empty line."""
    found = read_object(raw)
    if found is None:
        text = harmless(raw[: 4 * JUNK_CHARS].decode(errors="replace")).strip()[:JUNK_CHARS]
        return Line(neighbour, "info", member, "", text) if text else None
    when = seconds(found.pop("time", None))
    level, role = found.pop("level", ""), found.pop("role", "")
    message, said = found.pop("message", ""), found.pop("id", "")
    return Line(
        time=neighbour if when is None else when,
        level=level_of(level),
        member=one_word(said) or member,
        role=one_word(role),
        message=harmless(message if isinstance(message, str) else json.dumps(message)),
        fields=found if is_plain(raw) else tame(found, DEPTH + 1),
    )


def one_word(said: Any) -> str:
    """A name as it stands at the head of a line: it must not be two lines."""
    return " ".join(harmless(said).split())[:NAME_CHARS] if isinstance(said, str) else ""


def read_object(raw: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is none."""
    if not raw.startswith(b"{"):
        return None
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        try:  # NaN and halves of surrogate pairs, which some writers leave in
            found = json.loads(raw.decode(errors="replace"))
        except (ValueError, RecursionError):
            return None
    return found if isinstance(found, dict) else None


def seconds(text: Any) -> float | None:
    """RFC 3339, or a number of seconds."""
    try:
        if isinstance(text, str):
            when = datetime.fromisoformat(text)
            found = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        elif isinstance(text, int | float) and not isinstance(text, bool):
            found = float(text)
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return found if 0 <= found < 1e11 else None


def level_of(text: Any) -> str:
    level = text.lower() if isinstance(text, str) else ""
    level = ALIASES.get(level, level)
    return level if level in LEVELS else "info"


def is_plain(raw: bytes) -> bool:
    """Nothing in this object, which was read, needs taming; as it is with most lines. No text of it can hold a control
    character, no number many digits, and no list many others."""
    return (
        len(raw) < 2000
        and raw.isascii()
        and b"\\" not in raw
        and b"\x7f" not in raw
        and raw.count(b"[") + raw.count(b"{") <= DEPTH
    )


def tame(value: Any, depth: int = DEPTH) -> Any:
    if isinstance(value, str):
        return value if value.isprintable() else harmless(value)
    if isinstance(value, dict):
        if not depth:
            return "…"
        return {harmless(key): tame(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [tame(inner, depth - 1) for inner in value] if depth else "…"
    if isinstance(value, int) and value.bit_length() > BITS:  # its digits would take minutes
        return f"a number of {value.bit_length():,} bits"
    return value


# -- which lines ------------------------------------------------------------------------------------------


class Wanted(msgspec.Struct, frozen=True):
    """Which lines: those that meet all that is given."""

    members: frozenset[str] = frozenset()  # empty: all
    roles: frozenset[str] = frozenset()  # empty: all
    level: str = "debug"  # at least
    text: str = ""  # is in what `searched` makes of the line, capital or small
    pattern: re.Pattern[str] | None = (
        None  # is found there; not for strangers, who could make it take for ever
    )
    since: float | None = None  # seconds since the Unix epoch
    until: float | None = None  # before that
    printed: bool = False  # only what scripts print
    steps: tuple[int, int] | None = None  # first and last; a line without a step is not wanted then

    def takes(self, line: Line) -> bool:
        if self.members and line.member not in self.members:
            return False
        if self.roles and line.role not in self.roles:
            return False
        if LEVELS.index(line.level) < LEVELS.index(self.level):
            return False
        if self.since is not None and line.time < self.since:
            return False
        if self.until is not None and line.time >= self.until:
            return False
        if self.printed and "stream" not in line.fields:
            return False
        if self.steps is not None:
            step = line.step
            if step is None or not self.steps[0] <= step <= self.steps[1]:
                return False
        if self.text and self.text.casefold() not in searched(line).casefold():
            return False
        return self.pattern is None or self.pattern.search(searched(line)) is not None


# Of each line of a process, and not what it is about.
PROCESS = frozenset(
    {"run", "job", "host", "pid", "stream", "step", "trace_id", "span_id", "exception", "goes_on"}
)


def details(line: Line) -> list[str]:
    """`key=value` of what a message is about."""
    return [f"{key}={value_text(value)}" for key, value in line.fields.items() if key not in PROCESS]


def value_text(value: Any) -> str:
    if isinstance(value, str):
        return value if value and " " not in value else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def failure(line: Line) -> list[str]:
    """Of a line with an exception: a line per frame, the innermost last, then what was raised, as Python prints it."""
    chain = line.fields.get("exception")
    if not isinstance(chain, list):
        return [str(chain)] if chain else []
    said = []
    for each in reversed(chain):
        if not isinstance(each, dict):
            continue
        for frame in each.get("frames") or []:
            if isinstance(frame, dict):
                place = f"{frame.get('filename', '?')}:{frame.get('lineno', '?')}"
                said.append(f"{place} in {frame.get('name', '?')}")
        said.append(f"{each.get('exc_type', 'Exception')}: {each.get('exc_value', '')}")
    return said


def searched(line: Line) -> str:
    """What a text is looked for in: all that is shown of a line, but for its time and its level."""
    return "\n".join([" ".join([line.member, line.message, *details(line)]), *failure(line)])
