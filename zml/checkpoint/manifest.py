"""MANIFEST.json: which files are a checkpoint, and of which bytes they are.

Rule: exactly one text says a given thing. A manifest is accepted if rendering what it says gives the very bytes
that were read, and if it carries the hash of what it says; so no byte of it can change unnoticed. No number
in it is a float, whose text might depend on who writes it.
"""

import json
import re
from typing import Any

import msgspec
import xxhash

from .folder import MANIFEST, MOST_STEP, is_file_name

FORMAT = 1
RUN_ENDED = "run ended"  # why a checkpoint was taken that no step and no time had asked for
MOST_BYTES = 16 << 20
_XXH3 = re.compile(r"[0-9a-f]{16}")


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bytes: int
    xxh3: str  # 16 hexadecimal digits


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    name: str  # of the folder when it was sealed; a copy may have another
    step: int
    epoch: int
    created: str  # UTC, ISO 8601
    because: str  # why it was taken: "every 500 steps", RUN_ENDED
    layout: str  # digest of the layout's registration
    parameters: int  # elements of all of them
    files: dict[str, File]
    xxh3: str = ""  # of all the above

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


class BadManifest(ValueError):
    """These bytes are no manifest. The text says why, and begins in mid-sentence."""


def canonical(said: Any) -> str:
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def render(manifest: Manifest) -> bytes:
    """The bytes of the file, with the hash in it, whatever `xxh3` said before."""
    said: dict[str, Any] = msgspec.to_builtins(manifest)
    del said["xxh3"]
    said["xxh3"] = xxhash.xxh3_64_hexdigest(canonical(said).encode())
    return (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()


def parse(data: bytes) -> Manifest:
    """Raises BadManifest."""
    if len(data) > MOST_BYTES:
        raise BadManifest(f"has {len(data)} bytes, more than {MOST_BYTES}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadManifest(f"cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise BadManifest(f"is of format {manifest.format}; this is zml's format {FORMAT}")
    if render(manifest) != data:
        raise BadManifest("does not have the bytes that its own xxh3 was made of")
    if not 0 <= manifest.step <= MOST_STEP or manifest.epoch < 0 or manifest.parameters < 1:
        raise BadManifest("has a step, an epoch or a number of parameters that cannot be")
    for name, file in manifest.files.items():
        if not is_file_name(name) or name == MANIFEST or file.bytes < 0 or not _XXH3.fullmatch(file.xxh3):
            raise BadManifest(f"lists {name[:60]!r} in a way that cannot be")
    return manifest
