"""What the senior worker's script says of itself at the start of an epoch, for those who come later.

Its learning rate schedules live in the script's memory and nowhere else (see `worker.schedules`). The coordinator keeps
the newest note and understands nothing of it.
"""

from ..messages import Note, Ok
from ..transport import Refusal
from .docket import Docket
from .facts import Noted

MOST_BYTES = 64 << 10


class Notes:
    """The first note of an epoch counts: twice is the same as once."""

    def __init__(self, docket: Docket) -> None:
        self.docket = docket

    @property
    def newest(self) -> bytes:
        """Of the start of `epoch`, or empty."""
        note = self.docket.facts.noted
        return note.note if note is not None else b""

    @property
    def epoch(self) -> int:
        note = self.docket.facts.noted
        return note.epoch if note is not None else -1

    def take(self, message: Note, note: bytes) -> Ok:
        now_in = self.docket.ledger.epoch
        if len(note) > MOST_BYTES or message.epoch > now_in:
            raise Refusal("note", f"{len(note):,} bytes on epoch {message.epoch}; the job is in {now_in}")
        if message.epoch > self.epoch:
            self.docket.fact(Noted(message.epoch, note))
        return Ok()

    def from_whom(self, epoch: int) -> str:
        """Who is to send the note of this epoch: who opened it."""
        current = self.docket.ledger.current
        return current.opener if current is not None and current.epoch == epoch else ""

    def complete(self) -> bool:
        """Nothing is on its way. A script that begins in the first epoch needs no note."""
        epoch = self.docket.ledger.epoch
        return epoch <= max(0, self.epoch) or self.from_whom(epoch) not in self.docket.ledger.present
