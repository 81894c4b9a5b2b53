"""Files in TOML that say how a cluster is served, read into types. A key that is not known is an error that names the
nearest one: a misspelt limit that is silently ignored is no limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..config import unknown
from ..errors import USAGE, ZmlError

T = TypeVar("T", bound=msgspec.Struct)


def read(path: Path, fix: str) -> dict[str, Any]:
    """What is in a file. Raises ZmlError."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ZmlError(USAGE, f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as bad:
        raise ZmlError(USAGE, f"{path}: {bad}", fix) from None


def convert(table: Any, kind: type[T], place: str, fix: str) -> T:
    """One table of it, as this type. `place` and `fix` are for people. Raises ZmlError."""
    known = kind.__struct_fields__
    for key in table if isinstance(table, dict) else ():
        if key not in known:
            raise unknown(key[:60], known, place, f"It can have {', '.join(known)}.", code=USAGE)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as bad:
        raise ZmlError(USAGE, f"{place}: {bad}", fix) from None
