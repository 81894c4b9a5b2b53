"""States of a stream that scripts have told, by part: from where somebody else could read on.

They save time, and nothing depends on them: who finds none reads from the front (`worker.exact_streams`). What is in
them is the script's own; nobody here looks into it. Of each part the newest few are kept: who goes on needs one that
lies no further than what is applied, and a checkpoint may lie behind what has been told.
"""

from __future__ import annotations

import msgspec
import structlog

from ..checkpoint import Checkpoint
from ..messages import FindStream, Message, StreamAt, StreamFound
from ..transport import Refusal
from .docket import Docket
from .facts import Passed

FILE = "streams.json"  # in a checkpoint
MOST_PARTS = 1_024
MOST_STATE = 64 << 10  # bytes
MOST_FILE = 64 << 20

log = structlog.get_logger()


class Streams:
    """One job's."""

    def __init__(self, docket: Docket) -> None:
        self.docket = docket

    def told(self, message: StreamAt, state: bytes) -> None:
        """A notice; what does not fit, or comes twice, is passed over."""
        fact = Passed(message.part, message.position, state)
        if _is_one(fact) and fact not in self.docket.facts.passed.get(fact.part, ()):
            self.docket.fact(fact)

    def find(self, message: FindStream) -> tuple[Message, bytes | None]:
        """The nearest one at this position or before it; position 0 and none where there is none."""
        if not 0 <= message.part < MOST_PARTS:
            raise Refusal(
                "stream", f"part {message.part} of a stream; 0 to {MOST_PARTS - 1} can be kept account of"
            )
        before = [
            each
            for each in self.docket.facts.passed.get(message.part, ())
            if each.position <= message.position
        ]
        if not before:
            return StreamFound(message.job, 0), None
        return StreamFound(message.job, before[-1].position), before[-1].state

    def files(self) -> dict[str, bytes]:
        """What a checkpoint is to hold of them."""
        kept = [each for part in self.docket.facts.passed.values() for each in part]
        if not kept:
            return {}
        while sum(len(each.state) for each in kept) > MOST_FILE:
            kept = kept[1:]
        said = [(each.part, each.position, each.state.decode(errors="replace")) for each in kept]
        return {FILE: msgspec.json.encode(said) + b"\n"}

    def begin_with(self, checkpoint: Checkpoint) -> None:
        """Those of the run before, if they can be read."""
        if FILE not in checkpoint.manifest.files:
            return
        try:
            said = msgspec.json.decode((checkpoint.path / FILE).read_bytes(), type=list[tuple[int, int, str]])
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("the stream is read from the front", because=str(error))
            return
        for part, position, state in said:
            if _is_one(fact := Passed(part, position, state.encode())):
                self.docket.fact(fact)


def _is_one(fact: Passed) -> bool:
    return 0 <= fact.part < MOST_PARTS and fact.position > 0 and 0 < len(fact.state) <= MOST_STATE
