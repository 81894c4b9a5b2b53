"""What the senior worker's script says of itself at the start of an epoch, for those who come later.

Its learning rate schedules live in the script's memory and nowhere else (see `schedules`). The coordinator keeps the
newest note and understands nothing of it.
"""

from .messages import Note, Ok
from .scheduler.batches import Ledger
from .transport import Refusal

MOST_BYTES = 64 << 10


class Notes:
    """`newest` is of the start of `epoch`, or empty. The first note of an epoch counts: twice is the same as once."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.newest = b""
        self.epoch = -1

    def take(self, message: Note, note: bytes) -> Ok:
        if len(note) > MOST_BYTES or message.epoch > self.ledger.epoch:
            raise Refusal(
                "note", f"{len(note):,} bytes on epoch {message.epoch}; the job is in {self.ledger.epoch}"
            )
        if message.epoch > self.epoch:
            self.newest, self.epoch = note, message.epoch
        return Ok()

    def from_whom(self, epoch: int) -> str:
        """Who is to send the note of this epoch: who opened it."""
        current = self.ledger.current
        return current.opener if current is not None and current.epoch == epoch else ""

    def complete(self) -> bool:
        """Nothing is on its way. A script that begins in the first epoch needs no note."""
        epoch = self.ledger.epoch
        return epoch <= max(0, self.epoch) or self.from_whom(epoch) not in self.ledger.present
