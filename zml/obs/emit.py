"""YAML that people like to read, of plain data: mappings, lists, text, numbers, truth. No dependency for one way out.

A text is written plainly where nothing can take it for anything else, in YAML 1.1 as in 1.2; a longer one as a block;
all others in double quotes, as JSON has them, which YAML takes as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./ -]*[A-Za-z0-9_/-]|[A-Za-z/]|[0-9]+(?:ms|[smhd])")
# What some reader takes for something else: YAML 1.1 knows yes, on and y as truth.
TAKEN = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"})
# Characters that YAML wants escaped, and JSON does not: controls, line ends of Unicode, surrogates, byte order marks.
ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class Said:
    """A value with a comment of its own, in the lines before it."""

    comment: str
    value: Any


def to_yaml(data: Mapping[str, Any] | Sequence[Any], head: str = "") -> str:
    """One document. `head` is a comment at its beginning."""
    lines = [*comment(head, ""), *([""] if head else []), *_lines(data, "")]
    return "\n".join(lines) + "\n"


def comment(text: str, indent: str) -> Iterator[str]:
    for line in text.splitlines():
        shown = "".join(letter if letter.isprintable() else "?" for letter in line)
        yield f"{indent}# {shown}".rstrip()


def _lines(data: Any, indent: str) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            if isinstance(value, Said):
                yield from comment(value.comment, indent)
                value = value.value
            yield from _entry(f"{indent}{scalar(key)}:", value, indent)
        return
    for value in data:
        if isinstance(value, Said):
            yield from comment(value.comment, indent)
            value = value.value
        if isinstance(value, Mapping | list | tuple) and value:
            # The first line of what is inside stands behind the dash; comments would have to stand before it.
            inner = list(_lines(value, indent + "  "))
            first = next(number for number, line in enumerate(inner) if not line.lstrip().startswith("#"))
            yield from (line.replace("  ", "", 1) for line in inner[:first])
            yield f"{indent}- {inner[first].lstrip()}"
            yield from inner[first + 1 :]
        else:
            yield from _entry(f"{indent}-", value, indent)


def _entry(before: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping | list | tuple) and value:
        yield before
        yield from _lines(value, indent + "  ")
    elif isinstance(value, str) and _is_block(value):
        chomp = "" if value.endswith("\n") else "-"
        yield f"{before} |{chomp}"
        yield from (f"{indent}  {line}".rstrip() for line in value.removesuffix("\n").split("\n"))
    else:
        yield f"{before} {scalar(value)}"


def _is_block(text: str) -> bool:
    """Whether it comes back exactly from the lines of a literal block."""
    lines = text.removesuffix("\n").split("\n")
    return (
        "\n" in text
        and all(line and line == line.rstrip() and line.isprintable() for line in lines)
        and not text.startswith(" ")
        and not ESCAPED.search(text)
    )


def scalar(value: Any) -> str:
    """What is on one line. Raises TypeError for what YAML has no plain form of."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            text = json.dumps(value, allow_nan=False)
            # YAML 1.1 reads 1e-05 as text: a number has a point.
            return text if "e" not in text or "." in text else text.replace("e", ".0e")
        case str():
            if PLAIN.fullmatch(value) and value.lower() not in TAKEN and "  " not in value:
                return value
            return ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
        case Mapping() | list() | tuple() if not value:
            return "{}" if isinstance(value, Mapping) else "[]"
        case _:
            raise TypeError(f"no YAML for {type(value).__name__}")
