"""States of a stream that scripts have told, by part: from where somebody else could read on.

They save time, and nothing depends on them: who finds none reads from the front (`worker.exact_streams`). So they are
no part of the journal, but lie beside it in a file, which is written now and then, and in checkpoints. What is in them
is the script's own; nobody here looks into it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from ..checkpoint import Checkpoint
from ..messages import MOST_PARTS, MOST_STATE, FindStream, Message, StreamAt, StreamFound
from ..runs import rundir
from ..thinning import thinned
from ..transport import Refusal

FILE = "streams.json"  # in a checkpoint, and beside the journal
MOST_BYTES = 16 << 20  # of all states
WRITE_S = 2.0  # between two writings of the file
REST = 50  # times as long as a writing took, before the next

log = structlog.get_logger()


class State(NamedTuple):
    """Of a part, before its `position`th batch."""

    part: int
    position: int
    state: str


class Streams:
    """One job's. `folder`: where the file is; None: the states die with this process."""

    def __init__(self, folder: Path | None = None) -> None:
        self.file = folder / FILE if folder is not None else None
        self.kept: dict[int, dict[int, str]] = {}  # by part and position
        self.bytes = 0
        self.write_at = 0.0
        if self.file is not None and self.file.exists():
            self._read(self.file)

    def told(self, message: StreamAt, state: bytes) -> None:
        """A notice; what does not fit, or comes twice, is passed over."""
        try:
            self._keep(State(message.part, message.position, state.decode("ascii")))
        except UnicodeDecodeError:
            return
        if self.file is not None and time.monotonic() >= self.write_at:
            self._write(self.file)

    def _keep(self, new: State) -> None:
        if not (0 <= new.part < MOST_PARTS and new.position > 0 and 0 < len(new.state) <= MOST_STATE):
            return
        part = self.kept.setdefault(new.part, {})
        before = sum(map(len, part.values()))
        part[new.position] = new.state
        self.kept[new.part] = {each: part[each] for each in thinned(part, new.position)}
        self.bytes += sum(map(len, self.kept[new.part].values())) - before
        if self.bytes > MOST_BYTES:  # then of this part the newest alone, or none
            self.bytes -= sum(map(len, self.kept.pop(new.part).values()))
            if self.bytes + len(new.state) <= MOST_BYTES:
                self.bytes += len(new.state)
                self.kept[new.part] = {new.position: new.state}

    def find(self, message: FindStream) -> tuple[Message, bytes | None]:
        """The nearest one at this position or before it; position 0 and none where there is none."""
        if not 0 <= message.part < MOST_PARTS:
            raise Refusal("stream", f"there is no part {message.part} of a stream, but 0 to {MOST_PARTS - 1}")
        part = self.kept.get(message.part, {})
        at = max((position for position in part if position <= message.position), default=0)
        return StreamFound(message.job, at), part[at].encode() if at else None

    # -- files -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """What a checkpoint is to hold of them."""
        return {FILE: self._said()} if self.kept else {}

    def begin_with(self, checkpoint: Checkpoint) -> None:
        """Those of the run before, if they can be read."""
        if FILE in checkpoint.manifest.files:
            self._read(checkpoint.path / FILE)

    def _said(self) -> bytes:
        kept = self.kept.items()
        said = [State(part, position, state) for part, states in kept for position, state in states.items()]
        return msgspec.json.encode(said) + b"\n"

    def _read(self, file: Path) -> None:
        try:
            if file.stat().st_size > 2 * MOST_BYTES + (1 << 20):
                raise ValueError(f"it has {file.stat().st_size:,} bytes")
            said = msgspec.json.decode(file.read_bytes(), type=list[State])
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("the stream is read from further back", file=str(file), because=str(error))
            return
        for each in said:
            self._keep(each)

    def _write(self, file: Path) -> None:
        began = time.monotonic()
        try:
            rundir.write(file, self._said())
        except OSError as error:
            log.warning("states of the stream are not written", file=str(file), because=str(error))
        now = time.monotonic()
        self.write_at = now + max(WRITE_S, REST * (now - began))
