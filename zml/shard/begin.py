"""What a shard begins with: a layout, which chunks of it are its own, and perhaps what a checkpoint has of them.

Rule: what cannot be begun with changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from ..checkpoint import BadCheckpoint, Checkpoint, read
from ..checkpoint.folder import MANIFEST, is_seen
from ..layout import BadLayout, Registration
from ..messages import Assign, Assignment
from ..transport import Refusal
from .store import Store

Sees = Callable[[Path], bool]  # is this folder of the coordinator's on this machine, as far as can be seen?


class CannotBegin(Refusal):
    """The checkpoint is not to be had here. Whoever replays a log may `bring` it, and begin again."""

    def __init__(self, name: str, assign: Assign, payload: bytes | memoryview, because: str) -> None:
        super().__init__("checkpoint", f"{name} cannot begin with {assign.checkpoint}: {because}")
        self.assign = assign
        self.payload = bytes(payload)


def read_assignment(payload: bytes | memoryview) -> tuple[Registration, Assignment]:
    """A layout and where its chunks live. Refusal where it cannot be read."""
    try:
        assignment = msgspec.msgpack.decode(payload, type=Assignment)
        return Registration.from_bytes(assignment.registration), assignment
    except (msgspec.MsgspecError, BadLayout) as bad:
        raise Refusal("layout", f"the layout cannot be used: {bad}") from None


def near(folder: Path, manifest: str, chunks: Iterable[int]) -> Checkpoint:
    """The checkpoint in a folder of this machine, with the files that have these chunks verified to the byte.

    A folder of that name may be another one: it is the coordinator's if its manifest has the hash `manifest` (empty: of
    an older coordinator, which told none). Raises BadCheckpoint.
    """
    checkpoint = read(folder, deep=False)
    if manifest and checkpoint.manifest.xxh3 != manifest:
        raise BadCheckpoint(folder, MANIFEST, "is not the one that the job began with")
    checkpoint.check(chunks)
    return checkpoint


def begin(
    store: Store,
    name: str,
    assign: Assign,
    payload: bytes | memoryview,
    brought: Checkpoint | None,
    sees: Sees = is_seen,
) -> None:
    """Let the store begin with what was brought, else with what the folder has. Raises CannotBegin."""
    folder = Path(assign.checkpoint)
    try:
        if brought is None and not sees(folder):
            raise BadCheckpoint(folder, MANIFEST, "is not on this machine")
        found = brought or near(folder, assign.manifest, store.chunks)
        store.begin_with({index: found.chunk(index) for index in store.chunks})
    except (BadCheckpoint, ValueError, KeyError) as bad:
        raise CannotBegin(name, assign, payload, str(bad)) from None
