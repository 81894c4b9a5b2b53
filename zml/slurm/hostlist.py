"""Names of nodes as Slurm writes them in one word, `rack[1-2]n[01-03,7],login`, and one by one.

Rule: the same order and the same zeros as `scontrol show hostnames`, which is not there in every container.
"""

import re
from itertools import product

from ..errors import USAGE, ZmlError

MOST = 100_000  # names; a range beyond that is a mistake
_NAME = re.compile(r"(?:[^,\[\]\s]+|\[[0-9,-]+\])+")
_PART = re.compile(r"\[([0-9,-]+)\]|([^\[\]]+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def names(text: str) -> list[str]:
    """Raises ZmlError for what is no such list. Of an empty text none."""
    found: list[str] = []
    at = 0
    while at < len(text):
        match = _NAME.match(text, at)
        if match is None:
            raise _bad(text)
        parts = [_numbers(inside, text) if inside else [plain] for inside, plain in _PART.findall(match[0])]
        found += ("".join(part) for part in product(*parts))
        at = match.end()
        if len(found) > MOST or text[at : at + 1] not in ("", ",") or text[at:] == ",":
            raise _bad(text)
        at += 1
    return found


def _numbers(inside: str, text: str) -> list[str]:
    found: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not 0 <= int(last) - int(first) < MOST:
            raise _bad(text)
        found += (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return found


def _bad(text: str) -> ZmlError:
    return ZmlError(USAGE, f"{text[:80]!r} is no list of nodes", "Slurm writes them like n[1-4,7].")
